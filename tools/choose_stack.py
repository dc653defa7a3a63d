"""Prints the pip requirements of the torch stack that runs on this machine's GPU, or without one.

Runs before anything is installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lgcnet_fast.stack import list_gpus, requirements  # noqa: E402


def main() -> None:
    gpus, complaint = list_gpus()
    found = ", ".join(f"{gpu.name} (driver {gpu.driver})" for gpu in gpus) or "no GPU"
    chosen = " ".join(requirements(gpus))
    print(f"{found}: {chosen}", file=sys.stderr)
    if complaint:
        print(f"nvidia-smi lists no GPU: {complaint}", file=sys.stderr)
    print(chosen)


if __name__ == "__main__":
    main()
