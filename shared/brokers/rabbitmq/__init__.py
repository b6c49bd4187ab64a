"""RabbitMQ under the ``Broker`` port, through pika: the only package that imports it.

One thread per connection owns the socket and answers heartbeats, however long a handler or a
training takes; every other thread hands its publishes, acknowledgements and questions over and
waits for the answer. A connection that is lost stays lost: whoever holds it makes a new one and
goes on from the ledger.

Runs on RabbitMQ 3.10 and 4.x alike: durable quorum queues, no global prefetch, no transient
queues, no consumer timeout to rely on (nothing is held unacknowledged for longer than a handler).
"""

from shared.brokers.rabbitmq.connection import RabbitConnection, connect

__all__ = ["RabbitConnection", "connect"]
