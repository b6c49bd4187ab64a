"""How messages travel: the `Broker` port, the broker inside this process, and RabbitMQ."""
