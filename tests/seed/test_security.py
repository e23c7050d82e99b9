"""TLS, mutual TLS and logins: with an Apache Kafka that has a port for each, and certificates made here."""

from __future__ import annotations

import gc
import json
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from commands import Done, flowkit, read_topic
from cryptography.hazmat.primitives import serialization
from processes import Process
from servers import HOST, REPOSITORY, SecureKafka, WaitFor, why_not_apache_kafka

from flowkit import ConfigurationError, Settings
from flowkit.clients.kafka_admin import Cluster
from flowkit.clients.kafka_python import Consumer, Producer

EXAMPLES = REPOSITORY / "examples"
PASSWORD = "s3cret-of-ann"
KEY_PASSWORD = "s3cret-of-key"
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")

Env = dict[str, str]


class Certificates:
    """An authority, a certificate it has signed for clients, and whatever may be wrong in their place."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca, other = trustme.CA(), trustme.CA()
        self.ca_pem = self._file("ca.pem", self.ca.cert_pem.bytes())
        self.other_ca = self._file("other-ca.pem", other.cert_pem.bytes())
        self.client, self.client_key = self._pair("client", self.ca.issue_cert("shop@example.com"))
        self.stranger, self.stranger_key = self._pair("stranger", other.issue_cert("shop@example.com"))
        past = datetime.now(UTC) - timedelta(days=1)
        old = self.ca.issue_cert("shop@example.com", not_before=past - timedelta(days=9), not_after=past)
        self.expired, self.expired_key = self._pair("expired", old)
        self.encrypted_key = self._file("encrypted-key.pem", _key(self.client_key.read_bytes(), KEY_PASSWORD))
        self.nonsense = self._file("nonsense.pem", b"nothing")

    def server(self, name: str, *identities: str) -> Path:
        """A file with key and certificate of a broker."""
        leaf = self.ca.issue_cert(*identities)
        return self._file(f"{name}.pem", _key(leaf.private_key_pem.bytes()) + leaf.cert_chain_pems[0].bytes())

    def _pair(self, name: str, leaf: trustme.LeafCert) -> tuple[Path, Path]:
        certificate = self._file(f"{name}.pem", leaf.cert_chain_pems[0].bytes())
        return certificate, self._file(f"{name}-key.pem", _key(leaf.private_key_pem.bytes()))

    def _file(self, name: str, content: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(content)
        return path


def _key(pem: bytes, password: str | None = None) -> bytes:
    """A private key in PKCS 8, which Kafka insists on."""
    key = serialization.load_pem_private_key(pem, None)
    encryption = (
        serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    )
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


@dataclass(frozen=True, slots=True)
class Secure:
    """The broker, the certificates, and the variables that let ``flowkit`` in by one port or another."""

    node: SecureKafka
    certificates: Certificates

    def hosts(self, protocol: str) -> str:
        return f"{HOST}:{self.node.ports[protocol]}"

    def mutual_tls(self, **more: object) -> Env:
        files = {
            "KAFKA_SSL_CA_CERT": self.certificates.ca_pem,
            "KAFKA_SSL_CLIENT_CERT": self.certificates.client,
            "KAFKA_SSL_CLIENT_CERT_KEY": self.certificates.client_key,
        }
        return variables({"KAFKA_HOSTS": self.hosts("SSL"), **files, **more})

    def login(self, mechanism: str, protocol: str = "SASL_SSL", **more: object) -> Env:
        tls = protocol == "SASL_SSL"
        how = {"KAFKA_SSL_CA_CERT": self.certificates.ca_pem} if tls else {"KAFKA_SECURITY_PROTOCOL": protocol}
        login = {"KAFKA_SASL_PLAIN_USERNAME": "ann", "KAFKA_SASL_PLAIN_PASSWORD": PASSWORD}
        return variables(
            {"KAFKA_HOSTS": self.hosts(protocol), "KAFKA_SASL_MECHANISM": mechanism, **how, **login, **more}
        )


def variables(settings: Mapping[str, object]) -> Env:
    return {f"FLOWKIT_{name}": str(value) for name, value in settings.items() if value is not None}


@pytest.fixture(autouse=True)
def no_socket_is_left() -> Iterator[None]:
    """kafka-python leaves the sockets of refused logins to the garbage collector: here, and not in another test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    if reason := why_not_apache_kafka():
        pytest.skip(f"a broker with TLS is needed, and {reason}")
    certificates = Certificates(tmp_path_factory.mktemp("certificates"))
    server = certificates.server("server", HOST)
    directory = tmp_path_factory.mktemp("secure")
    with SecureKafka(directory, server_pem=server, ca_pem=certificates.ca_pem, password=PASSWORD) as node:
        for topic in ("orders", "invoices"):
            node.create_topic(topic)
        yield Secure(node, certificates)


# The way in.


MUTUAL_TLS = "mutual TLS with an encrypted key"
CLIENTS = ["kafka-python", "confluent"]
WAYS = [MUTUAL_TLS, "PLAIN", "SCRAM-SHA-512", "SCRAM-SHA-256 without TLS"]


def way_in(secure: Secure, way: str) -> Env:
    mechanism, _, without_tls = way.partition(" without ")
    if way == MUTUAL_TLS:
        key = {"KAFKA_SSL_CLIENT_CERT_KEY": secure.certificates.encrypted_key}
        return secure.mutual_tls(**key, KAFKA_SSL_CLIENT_CERT_KEY_PASSWORD=KEY_PASSWORD)
    return secure.login(mechanism, "SASL_PLAINTEXT" if without_tls else "SASL_SSL")


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("way", WAYS)
def test_consumer_producer_and_commands_get_in(
    secure: Secure, tmp_path: Path, wait_for: WaitFor, way: str, client: str
) -> None:
    env = {**way_in(secure, way), "FLOWKIT_CLIENT": client}
    number = WAYS.index(way) + len(WAYS) * CLIENTS.index(client)
    # When a message is sent by the command line, and answered by the application
    assert_sent(flowkit("send", "secure:app", "orders", json.dumps({"id": number}), cwd=EXAMPLES, env=env))
    with Process("flowkit", "run", "secure:app", cwd=EXAMPLES, env=env, log=tmp_path / "log") as process:
        wait_for(lambda: b'{"order":%d}' % number in values(secure.node.hosts, "invoices"), what="the answer")
        assert process.stop() == 0, process.output
    # Then `info` finds the broker, and no secret is shown
    info = flowkit("info", "secure:app", cwd=EXAMPLES, env=env)
    assert f"answers: {env['FLOWKIT_KAFKA_HOSTS']}" in info.out
    for text in (process.output, info.out, info.err):
        assert PASSWORD not in text
        assert KEY_PASSWORD not in text


def values(hosts: str, topic: str) -> list[bytes]:
    return [record.value for record in read_topic(hosts, topic, 1)]


def assert_sent(done: Done) -> None:
    assert (done.code, done.out, done.err) == (0, "1 message sent to orders\n", "")


def test_the_settings_of_the_example_are_all_that_is_needed(secure: Secure, tmp_path: Path) -> None:
    # Given the files that the example names, in the folder where it runs
    (tmp_path / "certs").mkdir()
    for name, source in {
        "ca": secure.certificates.ca_pem,
        "shop": secure.certificates.client,
        "shop-key": secure.certificates.client_key,
    }.items():
        (tmp_path / "certs" / f"{name}.pem").write_bytes(source.read_bytes())
    (tmp_path / "secure.py").write_text((EXAMPLES / "secure.py").read_text())
    env = {"SHOP_KAFKA_PASSWORD": PASSWORD}
    # When only the hosts are others, then both ways of the example lead in
    for app, protocol in (("mutual_tls", "SSL"), ("scram", "SASL_SSL")):
        hosts = {"FLOWKIT_KAFKA_HOSTS": secure.hosts(protocol)}
        assert_sent(flowkit("send", f"secure:{app}", "orders", '{"id": 0}', cwd=tmp_path, env={**env, **hosts}))


# What is wrong, who says so, and what to do.


def tell(secure: Secure, env: Env, code: int) -> str:
    """What ``flowkit send`` says, which must come soon, in one line, and without secrets."""
    started = time.monotonic()
    done = flowkit("send", "secure:app", "orders", "{}", cwd=EXAMPLES, env=env)
    assert time.monotonic() - started < 15
    assert done.code == code, done.err
    assert done.err.startswith("flowkit: ")
    assert done.err.count("\n") == 1, done.err
    assert not any(secret in done.err for secret in (PASSWORD, KEY_PASSWORD, "wrong-one"))
    return done.err


def test_the_other_client_says_what_is_wrong_as_well(secure: Secure) -> None:
    wrong_password = secure.login("SCRAM-SHA-512", KAFKA_SASL_PLAIN_PASSWORD="wrong-one", CLIENT="confluent")
    assert "the login of 'ann' failed; check kafka.sasl_plain_username, kafka.sasl_plain_password" in tell(
        secure, wrong_password, 2
    )
    wrong_authority = secure.mutual_tls(KAFKA_SSL_CA_CERT=secure.certificates.other_ca, CLIENT="confluent")
    assert "do not come to terms in TLS: check kafka.ssl.ca_cert" in tell(secure, wrong_authority, 2)


FILES_THAT_CANNOT_BE = [
    ({"KAFKA_SSL_CA_CERT": "gone.pem"}, "kafka.ssl.ca_cert: gone.pem cannot be read: No such file or directory"),
    ({"KAFKA_SSL_CA_CERT": "{nonsense}"}, "kafka.ssl.ca_cert: {nonsense} has no certificate in PEM format"),
    ({"KAFKA_SSL_CLIENT_CERT": "{nonsense}"}, "kafka.ssl.client_cert: {nonsense} has no certificate in PEM format"),
    ({"KAFKA_SSL_CLIENT_CERT": None}, "kafka.ssl.client_cert_key is given, but not kafka.ssl.client_cert"),
    ({"KAFKA_SSL_CLIENT_CERT_KEY": "{nonsense}"}, "kafka.ssl.client_cert_key: {nonsense} has no private key"),
    (
        {"KAFKA_SSL_CLIENT_CERT_KEY": "{stranger_key}"},
        "kafka.ssl.client_cert_key: {stranger_key} is not the key of the certificate in {client}",
    ),
    (
        {"KAFKA_SSL_CLIENT_CERT_KEY": "{encrypted_key}"},
        "{encrypted_key} is encrypted; give its password as kafka.ssl.client_cert_key_password",
    ),
    (
        {"KAFKA_SSL_CLIENT_CERT_KEY": "{encrypted_key}", "KAFKA_SSL_CLIENT_CERT_KEY_PASSWORD": "wrong-one"},
        "kafka.ssl.client_cert_key_password: is not the password of {encrypted_key}",
    ),
    (
        {"KAFKA_SECURITY_PROTOCOL": "PLAINTEXT"},
        "is PLAINTEXT, which encrypts nothing, but kafka.ssl.ca_cert is given",
    ),
]


@pytest.mark.parametrize(("wrong", "says"), FILES_THAT_CANNOT_BE, ids=lambda item: str(item)[:60])
def test_files_that_cannot_be_used_are_named_before_a_broker_is_asked(
    secure: Secure, wrong: dict[str, str | None], says: str
) -> None:
    files = vars(secure.certificates)
    given = {name: value and value.format(**files) for name, value in wrong.items()}

    settings = Settings.load({"name": "shop"}, secure.mutual_tls(**given))
    for client in (lambda: Producer(settings), lambda: Consumer(settings, "group"), lambda: Cluster(settings)):
        with pytest.raises(ConfigurationError) as caught:
            client()
        assert says.format(**files) in str(caught.value)
        assert "wrong-one" not in str(caught.value)


def test_a_certificate_that_the_broker_does_not_know_is_told_so(secure: Secure) -> None:
    files = secure.certificates
    for certificate, key in ((files.stranger, files.stranger_key), (files.expired, files.expired_key)):
        env = secure.mutual_tls(KAFKA_SSL_CLIENT_CERT=certificate, KAFKA_SSL_CLIENT_CERT_KEY=key)
        error = tell(secure, env, 2)
        assert f"does not accept the certificate in kafka.ssl.client_cert ({certificate})" in error


def test_a_broker_that_wants_a_certificate_is_understood(secure: Secure) -> None:
    env = secure.mutual_tls(KAFKA_SSL_CLIENT_CERT=None, KAFKA_SSL_CLIENT_CERT_KEY=None)

    assert "asks for a certificate; name yours as kafka.ssl.client_cert and kafka.ssl" in tell(secure, env, 2)


def test_a_broker_of_another_authority_is_not_trusted(secure: Secure) -> None:
    other = secure.certificates.other_ca

    error = tell(secure, secure.mutual_tls(KAFKA_SSL_CA_CERT=other), 2)
    assert f"the certificate of Kafka at {secure.hosts('SSL')} is not signed by kafka.ssl.ca_cert ({other})" in error

    nothing = {"KAFKA_SSL_CA_CERT": None, "KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}
    error = tell(secure, secure.login("PLAIN", **nothing), 2)
    assert "is not signed by the authorities that this system trusts" in error


def test_a_broker_of_another_name_is_not_trusted(secure: Secure) -> None:
    port = secure.node.ports["SSL"]  # the certificate is for 127.0.0.1

    error = tell(secure, secure.mutual_tls(KAFKA_HOSTS=f"localhost:{port}"), 2)

    assert f"the certificate of Kafka at localhost:{port} is for another name" in error
    assert "Name the broker in kafka.hosts" in error


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_wrong_password_is_told_so(secure: Secure, mechanism: str) -> None:
    error = tell(secure, secure.login(mechanism, KAFKA_SASL_PLAIN_PASSWORD="wrong-one"), 2)

    assert "refuses this application: the login of 'ann' failed; check kafka.sasl_plain_username" in error


def test_a_login_without_a_password_is_not_tried(secure: Secure) -> None:
    error = tell(secure, secure.login("PLAIN", KAFKA_SASL_PLAIN_PASSWORD=None), 2)

    assert "kafka.sasl_plain_password: is required by PLAIN" in error


def test_no_tls_where_the_broker_wants_it(secure: Secure) -> None:
    for protocol in ("SSL", "SASL_SSL"):
        env = variables({"KAFKA_HOSTS": secure.hosts(protocol)})
        error = tell(secure, env, 2)
        assert f"Kafka at {secure.hosts(protocol)} expects TLS: name its authority's certificate" in error


def test_tls_where_the_broker_has_none(secure: Secure) -> None:
    hosts = secure.hosts("SASL_PLAINTEXT")

    error = tell(secure, secure.mutual_tls(KAFKA_HOSTS=hosts), 1)

    assert f"no Kafka broker at {hosts} lets this application in; it does not answer in TLS" in error


def test_no_login_where_the_broker_wants_one(secure: Secure) -> None:
    error = tell(secure, variables({"KAFKA_HOSTS": secure.hosts("SASL_PLAINTEXT")}), 1)

    assert "if this port is one for logins, set kafka.security_protocol to SASL_SSL or SASL_PLAINTEXT" in error


def test_a_login_where_the_broker_has_none(secure: Secure) -> None:
    error = tell(secure, secure.login("PLAIN", "SASL_PLAINTEXT", KAFKA_HOSTS=secure.node.hosts), 2)

    assert "takes no login at this port; take kafka.sasl_mechanism away" in error


def test_a_mechanism_that_the_broker_does_not_have(secure: Secure) -> None:
    error = tell(secure, secure.login("OAUTHBEARER"), 2)

    assert "it has no login by OAUTHBEARER; set kafka.sasl_mechanism to one that the broker has" in error


def test_a_port_that_is_silent_is_left_in_time(secure: Secure) -> None:
    with socket.create_server((HOST, 0)) as silent:
        hosts = f"{HOST}:{silent.getsockname()[1]}"
        assert "it does not answer in TLS" in tell(secure, secure.mutual_tls(KAFKA_HOSTS=hosts), 1)


def test_run_ends_where_the_broker_refuses_it_and_info_says_why(secure: Secure, tmp_path: Path) -> None:
    env = secure.login("SCRAM-SHA-512", KAFKA_SASL_PLAIN_PASSWORD="wrong-one")
    with Process("flowkit", "run", "secure:app", cwd=EXAMPLES, env=env, log=tmp_path / "log") as process:
        assert process.wait(20) == 2
    assert process.output.splitlines()[-1].startswith("flowkit: Kafka at ")
    assert "the login of 'ann' failed" in process.output
    info = flowkit("info", "secure:app", cwd=EXAMPLES, env=env)
    assert info.code == 0
    assert "the login of 'ann' failed" in info.out
    assert "wrong-one" not in process.output + info.out + info.err


class Nobody:
    """A ``Rebalance`` that takes what comes."""

    def assigned(self, partitions: object) -> None: ...

    def confirmed(self, offsets: object) -> None: ...

    def lost(self, partitions: object) -> None: ...

    def revoked(self, partitions: object) -> dict[object, int]:
        return {}


def test_a_consumer_whose_login_is_taken_away_while_it_runs_ends_with_that(secure: Secure, wait_for: WaitFor) -> None:
    # Given a consumer that has joined
    consumer = Consumer(Settings.load({"name": "shop"}, secure.login("PLAIN")), "group")
    consumer.subscribe(["orders"], Nobody())
    wait_for(lambda: consumer.poll(1.0) or consumer.joined(), what="the consumer to join")
    # When the broker comes back with another password
    secure.node.stop()
    properties = secure.node.directory / "server.properties"
    right = properties.read_text()
    properties.write_text(right.replace(f'user_ann="{PASSWORD}"', 'user_ann="another"'))
    secure.node.start()
    try:
        # Then the consumer does not try on for ever
        with pytest.raises(ConfigurationError, match="the login of 'ann' failed"):
            wait_for(lambda: consumer.poll(1.0), what="an error")
    finally:
        consumer.close(1)
        properties.write_text(right)
        secure.node.restart()


# Secrets.


def test_debug_lines_and_masks_keep_secrets(secure: Secure, tmp_path: Path) -> None:
    # Given an application with a secret of each kind, which logs all that there is to log
    files = secure.certificates
    key = {"KAFKA_SSL_CLIENT_CERT": files.client, "KAFKA_SSL_CLIENT_CERT_KEY": files.encrypted_key}
    more = {"KAFKA_SSL_CLIENT_CERT_KEY_PASSWORD": KEY_PASSWORD, "REDIS": "redis://ann:s3cret-of-redis@127.0.0.1:1/0"}
    env = secure.login("PLAIN", **key, **more)
    command = ("flowkit", "run", "secure:app", "--log-level", "debug")
    with Process(*command, cwd=EXAMPLES, env=env, log=tmp_path / "log") as process:
        process.wait_for("rebalanced", timeout=40)
        assert process.stop() == 0, process.output[-2000:]
    text = flowkit("info", "secure:app", cwd=EXAMPLES, env=env)
    as_json = flowkit("info", "secure:app", "--json", cwd=EXAMPLES, env=env)
    # Then kafka-python's own lines are there, and `info` has the settings, all of them without a secret
    assert "SaslAuthenticateRequest(...)" in process.output
    settings = json.loads(as_json.out)["settings"]
    assert settings["kafka.sasl_plain_password"] == settings["kafka.ssl.client_cert_key_password"] == "***"
    for shown in (process.output, text.out, text.err, as_json.out, as_json.err):
        for hidden in (PASSWORD, KEY_PASSWORD, "s3cret-of-redis"):
            assert hidden not in shown
