"""`python -m pagedcore.serve`: serves a model with tritonserver in the foreground, until Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from pathlib import Path
from typing import NoReturn

from pagedcore.serve.launcher import ServeOptions, prepare, report_errors, serve


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"must be an integer in [1, 65535], got {text!r}")
    return int(text)


def parse_arguments(arguments: list[str]) -> tuple[ServeOptions, bool]:
    """Parse the command line; the flag says that only the downloads are wanted."""
    parser = _Parser(prog="python -m pagedcore.serve", description=__doc__)
    parser.add_argument("--model", default="", help="Hugging Face model folder (default: the one in model.json)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--http-port", type=_port, default=8000, help="default: %(default)s")
    parser.add_argument("--grpc-port", type=_port, default=8001, help="default: %(default)s")
    parser.add_argument("--metrics-port", type=_port, default=8002, help="default: %(default)s")
    parser.add_argument("--model-repository", type=Path, default=Path("model_repository"), help="default: %(default)s")
    parser.add_argument("--tritonserver", default="", help="an installed tritonserver (default: the one in the cache)")
    parser.add_argument("--log", default="", help="the server's log file (default: a file in the cache)")
    parser.add_argument("--prepare", action="store_true", help="only obtain the default model and tritonserver")
    given = parser.parse_args(arguments)
    options = ServeOptions(
        model=given.model,
        host=given.host,
        http_port=given.http_port,
        grpc_port=given.grpc_port,
        metrics_port=given.metrics_port,
        model_repository=given.model_repository,
        tritonserver=Path(given.tritonserver) if given.tritonserver else None,
        log=Path(given.log) if given.log else None,
    )
    return options, given.prepare


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    options, only_prepare = parse_arguments(arguments)
    if only_prepare:
        return report_errors(lambda: prepare(options))
    return report_errors(lambda: serve(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
