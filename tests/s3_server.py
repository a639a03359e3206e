"""A server that speaks S3 over HTTP, with moto behind it; it remembers what it was asked."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "runs"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


class Request(NamedTuple):
    """One that was answered."""

    method: str
    path: str
    num_bytes: int
    """Of the byte range it asked for; 0 for anything else."""

    @property
    def is_read(self) -> bool:
        """Whether it asked for a part of an object."""
        return self.num_bytes > 0


@dataclass
class S3Server:
    """A running one."""

    url: str
    client: Any
    requests: list[Request]
    failures: list[int]
    """HTTP statuses that the next requests for byte ranges are answered with, last first."""

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}

    @property
    def reads(self) -> list[Request]:
        """The requests for byte ranges."""
        return [request for request in self.requests if request.is_read]

    def upload(self, folder: Path, prefix: str) -> str:
        """Put every file below `folder` under `prefix`; returns the URL."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.client.put_object(
                    Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder).as_posix()}", Body=path.read_bytes()
                )
        self.requests.clear()
        return f"s3://{BUCKET}/{prefix}"

    def put(self, url: str, content: bytes) -> None:
        """Replace one object."""
        self.client.put_object(Bucket=BUCKET, Key=url.removeprefix(f"s3://{BUCKET}/"), Body=content)


def serve() -> Iterator[S3Server]:
    """A server on a free port, until the generator is closed."""
    requests: list[Request] = []
    failures: list[int] = []
    moto = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", ""))
        num_bytes = int(wanted[2]) - int(wanted[1]) + 1 if wanted else 0
        requests.append(Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], num_bytes))
        if wanted and failures:
            start_response(f"{failures.pop()} failure", [("Content-Length", "0")])
            return []
        return moto(environ, start_response)

    # A line for every request would bury what a test has to say.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, answer, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    client = boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id="nobody",
        aws_secret_access_key="nothing",
        region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
    )
    client.create_bucket(Bucket=BUCKET)
    try:
        yield S3Server(url, client, requests, failures)
    finally:
        server.shutdown()
        thread.join()
