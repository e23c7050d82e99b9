"""Which of the clients an application has: the setting ``client`` says it. Each is imported only where it is used."""

from __future__ import annotations

from ..settings import Settings
from . import ConsumerClient, ProducerClient


def consumer_client(settings: Settings, group: str) -> ConsumerClient:
    """Raises ``ConfigurationError`` and ``BrokerUnavailable``."""
    if settings.client == "confluent":
        from .confluent import Consumer as ConfluentConsumer

        return ConfluentConsumer(settings, group)
    from .kafka_python import Consumer

    return Consumer(settings, group)


def producer_client(
    settings: Settings, transactional_id: str | None = None, *, tells_each: bool = True
) -> ProducerClient:
    """A ``TransactionalClient`` where an id is given. Raises ``ConfigurationError`` and ``BrokerUnavailable``."""
    if settings.client == "confluent":
        from . import confluent_producer

        if transactional_id is None:
            return confluent_producer.Producer(settings, tells_each=tells_each)
        return confluent_producer.TransactionalProducer(settings, transactional_id)
    if transactional_id is None:
        from .kafka_python import Producer

        return Producer(settings)
    from .kafka_transactions import TransactionalProducer

    return TransactionalProducer(settings, transactional_id)
