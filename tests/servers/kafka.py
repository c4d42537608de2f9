"""One real Apache Kafka broker (KRaft, one node) from the cached jars.

Invariants: topics are made by create_topic() only, so that a typo in a topic's name is an error, not a new topic.
Who comes to ``bootstrap`` may do anything; to ``login_bootstrap`` come user ``reader`` with password ``right``, who may
too, and ``stranger`` with password ``unloved``, who may do nothing.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

from confluent_kafka import IsolationLevel, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec  # type: ignore[attr-defined]  # not in its stubs

from tests.servers.process import Server, ServerFailedError, ServerProcess, free_port

_JARS_TOOL = Path(__file__).resolve().parents[2] / "tools" / "kafka_jars.sh"
_SETTINGS = """\
process.roles={roles}
node.id={node}
controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}
listeners=PLAINTEXT://127.0.0.1:{port},LOGIN://127.0.0.1:{login_port}{controller_listener}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},LOGIN://127.0.0.1:{login_port}
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,LOGIN:SASL_PLAINTEXT
listener.name.login.sasl.enabled.mechanisms=PLAIN
listener.name.login.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
  user_reader="right" user_stranger="unloved";
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS;User:reader
log.dirs={folder}/log
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
group.initial.rebalance.delay.ms=0
log.retention.ms=-1
"""


class KafkaBroker(Server):
    """Start a broker on free ports; close() ends it and removes its data.

    It keeps what it has: by itself a broker looks every five minutes for messages of more than a week ago, and those of
    a test's own calendar are that.

    :param first: the broker of the cluster that this one joins; None: it is a cluster of its own, and its controller.
    """

    def __init__(self, first: KafkaBroker | None = None) -> None:
        folder = Path(tempfile.mkdtemp(prefix="kafka-"))
        port = free_port()
        login_port = free_port()
        self.bootstrap = f"127.0.0.1:{port}"
        self.login_bootstrap = f"127.0.0.1:{login_port}"
        self.classpath = f"{_jars()}/*"
        settings = folder / "server.properties"
        self.node = 1 if first is None else first.node + 1
        self.controller_port = free_port() if first is None else first.controller_port
        controller = f",CONTROLLER://127.0.0.1:{self.controller_port}" if first is None else ""
        settings.write_text(
            _SETTINGS.format(
                roles="broker,controller" if first is None else "broker",
                node=self.node,
                port=port,
                login_port=login_port,
                controller_port=self.controller_port,
                controller_listener=controller,
                folder=folder,
            )
        )
        self.cluster_id = self._run_tool("random-uuid").split()[-1] if first is None else first.cluster_id
        alone = ["--standalone"] if first is None else []
        self._run_tool("format", "-t", self.cluster_id, "-c", str(settings), *alone)
        broker = ServerProcess(
            ["java", "-Xmx512m", "-cp", self.classpath, "kafka.Kafka", str(settings)],
            log=folder / "server.out",
            ready=lambda log: "Kafka Server started" in log,
        )
        super().__init__(folder, broker)

    def create_topic(
        self, name: str, partitions: int = 1, config: dict[str, str] | None = None, replicas: int = 1
    ) -> str:
        """Create a topic and return its name when every topic partition has a leader."""
        admin = self.admin()
        admin.create_topics([NewTopic(name, partitions, replicas, config=config or {})])[name].result(60)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            topic = admin.list_topics(name, timeout=30).topics[name]
            if len(topic.partitions) == partitions and all(p.leader >= 0 for p in topic.partitions.values()):
                return name
            time.sleep(0.05)
        raise ServerFailedError(f"topic {name} has no leaders after 60 s; the broker's log ends:\n{self.log_tail()}")

    def wait_until_stable(self, topic: str) -> None:
        """Return when readers of committed records see all that there is.

        A commit or an abort is answered before its markers are written: until they are, such a reader's end is before
        the transaction.
        """
        admin, latest = self.admin(), OffsetSpec.latest()  # type: ignore[no-untyped-call]
        places = {
            TopicPartition(topic, p): latest for p in admin.list_topics(topic, timeout=30).topics[topic].partitions
        }
        deadline = time.monotonic() + 60
        while True:
            stable, all_there = (
                {at: found.result(30).offset for at, found in admin.list_offsets(places, isolation_level=level).items()}
                for level in (IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED)
            )
            if stable == all_there:
                return
            if time.monotonic() > deadline:
                raise ServerFailedError(f"topic {topic} has an open transaction after 60 s: {stable}, not {all_there}")
            time.sleep(0.02)

    def admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap})

    def _run_tool(self, *arguments: str) -> str:
        return _answer(["java", "-Xmx128m", "-cp", self.classpath, "kafka.tools.StorageTool", *arguments])


def _jars() -> Path:
    return Path(_answer(["bash", str(_JARS_TOOL)]).split()[-1])


def _answer(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except FileNotFoundError as error:
        raise ServerFailedError(
            f"{command[0]} is not installed: run  make test  or tools/system_packages.sh"
        ) from error
    if done.returncode != 0:
        raise ServerFailedError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
