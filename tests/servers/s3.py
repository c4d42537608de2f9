"""One real S3 API (moto's server): buckets in memory, multipart, ranges; keys are checked as a cloud checks them.

Invariants: only the user made at the start may do anything; a restart empties it.
"""

from __future__ import annotations

import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import boto3
import s3fs

from tests.servers.process import Server, ServerProcess, free_port

_USERS_FIRST = 3  # calls that need no key: those of _make_user
_ALL = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'


class S3Server(Server):
    """Start a server on a free port; close() ends it.

    ``options`` are the file system's keyword arguments for its one user.
    """

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="s3-"))
        self.port = free_port()
        self.endpoint_url = f"http://127.0.0.1:{self.port}"
        server = ServerProcess(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            log=folder / "server.out",
            ready=lambda _: self._answers(),
            deadline_s=180,
            env={"INITIAL_NO_AUTH_ACTION_COUNT": str(_USERS_FIRST)},
        )
        super().__init__(folder, server)
        self._make_user()

    def restart(self) -> None:
        super().restart()
        self._make_user()

    def ensure_running(self) -> None:
        if self._process.running:
            self._process.resume()
        else:
            self.restart()

    def bucket(self, name: str) -> s3fs.S3FileSystem:
        """Make a bucket and return a file system that sees it."""
        files = s3fs.S3FileSystem(**self.options, use_listings_cache=False, skip_instance_cache=True)
        files.mkdir(name)
        return files

    @property
    def options(self) -> dict[str, Any]:
        return {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint_url}

    def _make_user(self) -> None:
        anybody = {"aws_access_key_id": "none", "aws_secret_access_key": "none", "region_name": "us-east-1"}
        users = boto3.client("iam", endpoint_url=self.endpoint_url, **anybody)
        users.create_user(UserName="ingest")
        users.put_user_policy(UserName="ingest", PolicyName="all", PolicyDocument=_ALL)
        made = users.create_access_key(UserName="ingest")["AccessKey"]
        self.key, self.secret = made["AccessKeyId"], made["SecretAccessKey"]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint_url}/moto-api/", timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False
