#!/bin/sh
# The official image's server reads RABBITMQ_DEFAULT_USER and _PASS itself, and so does Debian's 4.0.
set -eu
exec "$@"
