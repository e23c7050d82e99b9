"""Transactions on kafka-python 3.0, with waits that end.

Its own ``send_offsets_to_transaction`` and ``commit_transaction`` wait for ever where a broker is gone, so this waits for what
they wait for. A client of it that has failed may send what was left in it with a later transaction, so none is used again.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from kafka import errors as kafka_errors

from ..errors import BrokerUnavailable, ConfigurationError, DeliveryError
from ..settings import Settings
from . import LONGEST_REQUEST, CommitRefused, InDoubt, Offsets
from .complaints import displaced, id_refused, no_transactions, time_not_allowed
from .kafka_options import in_ms
from .kafka_python import Producer, _kafka_offsets
from .kafka_refusals import FORBIDDEN

logger = logging.getLogger(__name__)

RETRY_BACKOFF = 0.01
"""Seconds until a request is sent again. A broker refuses the first one of a transaction while it still writes the end of that
before, which takes milliseconds: kafka-python's 0.1 s would bound the rate at ten transactions a second."""

NO_FAULT_OF_THE_MESSAGE = (
    kafka_errors.ProducerFencedError,
    kafka_errors.InvalidProducerEpochError,
    kafka_errors.InvalidProducerIdMappingError,
    kafka_errors.InvalidTxnStateError,
    kafka_errors.OutOfOrderSequenceNumberError,
    kafka_errors.UnknownProducerIdError,
    kafka_errors.TransactionCoordinatorFencedError,
    kafka_errors.TransactionAbortedError,
    kafka_errors.OperationNotAttemptedError,
    kafka_errors.IllegalStateError,
)


class TransactionalProducer(Producer):
    """A ``TransactionalClient`` on ``KafkaProducer``. Making one ends what another with the same id has left open.

    Raises ``ConfigurationError`` where the brokers refuse transactions, ``BrokerUnavailable`` where they do not answer.
    """

    def __init__(self, settings: Settings, transactional_id: str) -> None:
        self.longest = longest = settings.kafka.transaction_timeout
        options = settings.kafka.options
        super().__init__(
            settings,
            transactional_id=transactional_id,
            transaction_timeout_ms=in_ms(longest),
            retry_backoff_ms=in_ms(RETRY_BACKOFF),
            # beyond its own time a transaction is void, whatever comes of its messages
            request_timeout_ms=min(options.get("request_timeout_ms", 15_000), in_ms(longest * LONGEST_REQUEST)),
            delivery_timeout_ms=min(options.get("delivery_timeout_ms", 30_000), in_ms(longest)),
        )
        try:
            self._init(transactional_id)
        except BaseException:
            self.close(0)
            raise

    def _init(self, transactional_id: str) -> None:
        try:
            self._wait(self._transactions.initialize_transactions(), time.monotonic() + self.longest)
        except kafka_errors.KafkaTimeoutError as error:
            raise no_transactions(self.longest) from error
        except kafka_errors.TransactionalIdAuthorizationFailedError as error:
            raise id_refused(transactional_id) from error
        except FORBIDDEN as error:
            raise ConfigurationError(f"Kafka refuses this application: {error}") from error
        except kafka_errors.KafkaError as error:
            if "InvalidTransactionTimeout" in repr(error):
                raise time_not_allowed(self.longest) from error
            raise BrokerUnavailable(f"Kafka has not opened transactions: {error!r}") from error

    def _wait(self, result: Any, deadline: float) -> None:
        """Raises what ended the request, and ``KafkaTimeoutError`` if nothing has by then."""
        self._producer._sender.wakeup()
        if not result.wait(timeout_ms=max(0.0, deadline - time.monotonic()) * 1000):
            raise kafka_errors.KafkaTimeoutError("Kafka does not answer")

    def begin(self) -> None:
        try:
            self._transactions.begin_transaction()
        except kafka_errors.KafkaError as error:
            raise DeliveryError(f"Kafka takes no transaction of this client: {error!r}", passing=True) from error

    def flush(self, timeout: float) -> None:
        super().flush(min(timeout, self.longest))

    def outcome(self, delivery: Any) -> DeliveryError | None:
        problem = super().outcome(delivery)
        if problem is not None and delivery.is_done and not problem.passing:
            error = delivery.exception
            # kafka-python tells by a plain KafkaError that the transaction as such went wrong
            if isinstance(error, NO_FAULT_OF_THE_MESSAGE) or type(error) is kafka_errors.KafkaError:
                problem.passing = True
        return problem

    def commit(self, offsets: Offsets, membership: Any) -> None:
        deadline = time.monotonic() + self.longest
        self._send_offsets(offsets, membership, deadline)
        try:
            result = self._transactions.begin_commit()
        except kafka_errors.KafkaError as error:
            raise DeliveryError(f"the transaction cannot be committed: {error!r}", passing=True) from error
        try:
            self._wait(result, deadline)
        except Exception as error:  # whatever it was: the request was on its way
            raise InDoubt(str(error) or type(error).__name__) from error

    def _send_offsets(self, offsets: Offsets, membership: Any, deadline: float) -> None:
        try:
            self._wait(self._transactions.send_offsets_to_transaction(_kafka_offsets(offsets), membership), deadline)
        except kafka_errors.CommitFailedError as error:
            raise CommitRefused(str(error) or type(error).__name__) from error
        except kafka_errors.FencedInstanceIdError as error:
            raise displaced(membership.group_instance_id) from error
        except FORBIDDEN as error:
            raise ConfigurationError(f"Kafka refuses this application: {error}") from error
        except kafka_errors.KafkaError as error:
            raise DeliveryError(
                f"Kafka did not take the offsets of the transaction: {error!r}", passing=True
            ) from error
