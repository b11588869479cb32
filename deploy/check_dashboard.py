"""Checks deploy/grafana-dashboard.json: each of its queries is asked of a real Prometheus that scrapes a server under load.

It starts a tritonserver with model_repository/, a Prometheus (Debian: apt-get install prometheus) on free loopback ports, and
clients that also cancel requests and send wrong ones. A query that Prometheus refuses or that finds nothing fails the check.
With --picture, the panels are drawn from Prometheus' answers; needs matplotlib.

Usage: python deploy/check_dashboard.py [--seconds 90] [--picture docs/dashboard.png]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedcore.serve.triton_server import TritonServer, find_free_ports

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "deploy" / "grafana-dashboard.json"
RATE_INTERVAL = "10s"
NUM_CLIENTS = 12
CONFIG = """
global: {{scrape_interval: 1s}}
scrape_configs:
  - job_name: triton
    static_configs: [{{targets: ["{target}"]}}]
"""


@dataclass(frozen=True)
class Series:
    """One line of a panel: (seconds, value) pairs."""

    label: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A panel and what Prometheus answered to its queries."""

    title: str
    unit: str
    series: list[Series]


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer; raises RuntimeError with Prometheus' words when it refuses."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{query}", timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{parameters}: {error.read().decode()}") from error


@contextlib.contextmanager
def prometheus(metrics_url: str, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus, scraping `metrics_url` every second, until the block is left."""
    (port,) = find_free_ports("127.0.0.1", 1)
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(target=urllib.parse.urlparse(metrics_url).netloc))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(30)


def run_client(url: str, until: float, seed: int) -> None:
    """Send one request after another: most complete, some are given up after a few tokens, some are wrong."""
    rng = random.Random(seed)
    topics = [
        f"Facts about {topic} that everybody should know, told to a curious child." for topic in ("seas", "stars")
    ]
    while time.time() < until:
        kind = rng.choices(("whole", "given up", "wrong"), (80, 12, 8))[0]
        sampling = {"max_tokens": rng.randint(4, 60), "temperature": -1 if kind == "wrong" else 0.8}
        prompt = rng.choice(topics) * rng.randint(1, 6) + f" Number {rng.randint(1, 9)}:"
        body = {"text_input": prompt, "stream": True, "sampling_parameters": json.dumps(sampling)}
        connection = http.client.HTTPConnection(url, timeout=60)
        connection.request("POST", "/v2/models/llm/generate_stream", json.dumps(body))
        response = connection.getresponse()
        if kind == "given up":
            response.readline()
        else:
            response.read()
        connection.close()
        time.sleep(rng.random())


def load(url: str, seconds: float) -> None:
    """Clients that begin one after the other in the first third, and all end at the same time."""
    until = time.time() + seconds
    clients = [threading.Thread(target=run_client, args=(url, until, seed)) for seed in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
        time.sleep(seconds / 3 / NUM_CLIENTS)
    for client in clients:
        client.join()


def answer(server: Prometheus, panel: dict[str, Any], begin: float, end: float) -> Panel:
    """Ask a panel's queries, with Grafana's variables filled in."""
    series: list[Series] = []
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", RATE_INTERVAL).replace("$model", ".*")
        data = server.ask("query_range", query=query, start=str(begin), end=str(end), step="1")
        found = [_series(target["legendFormat"], result) for result in data["result"]]
        found = [line for line in found if line.points]
        if not found:
            raise RuntimeError(f"panel {panel['title']!r} finds nothing: {query}")
        series += found
    return Panel(panel["title"], panel["fieldConfig"]["defaults"]["unit"], series)


def _series(legend: str, result: dict[str, Any]) -> Series:
    for name, value in result["metric"].items():
        legend = legend.replace("{{" + name + "}}", value)
    points = [(float(at), float(value)) for at, value in result["values"]]
    return Series(legend, [point for point in points if math.isfinite(point[1])])


def draw(panels: list[Panel], path: Path, begin: float) -> None:
    """Draw the panels, three in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 3.1 * math.ceil(len(panels) / 3)), layout="constrained")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / 3), 3, number + 1)
        for series in panel.series:
            axes.plot(
                [at - begin for at, _ in series.points], [value for _, value in series.points], label=series.label
            )
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.set_ylim(bottom=0)
        axes.set_ylabel({"s": "seconds", "percentunit": "share"}.get(panel.unit, ""), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", ncols=4)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="how long the clients send requests")
    parser.add_argument("--picture", type=Path, help="file to draw the panels to")
    options = parser.parse_args()
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    with (
        tempfile.TemporaryDirectory() as folder,
        TritonServer(ROOT / "model_repository") as triton,
        prometheus(triton.metrics_url, Path(folder)) as server,
    ):
        time.sleep(3)  # a few scrapes of the idle server: a rate needs two
        begin = time.time()
        load(triton.http_url, options.seconds)
        end = time.time()
        panels = [answer(server, panel, begin, end) for panel in dashboard["panels"]]
        models = server.ask("label/model/values", **{"match[]": "vllm:num_requests_running"})
    if models != ["llm"]:
        sys.exit(f"the variable 'model' finds {models}, expected ['llm']")
    for panel in panels:
        print(f"{panel.title}: {', '.join(sorted({series.label for series in panel.series}))}")
    print(f"{sum(len(panel['targets']) for panel in dashboard['panels'])} queries of {len(panels)} panels answered")
    if options.picture is not None:
        draw(panels, options.picture, begin)


if __name__ == "__main__":
    main()
