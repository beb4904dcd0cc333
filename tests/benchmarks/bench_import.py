"""What importing the package adds to importing SAELens, by ``python -X importtime``: seconds, and their ratio."""

import json
import re
import subprocess
import sys


def seconds(code: str) -> dict[str, float]:
    """Seconds spent in each module that the code imports, those it imports in turn not counted."""
    report = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    rows = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)", report.stderr)
    return {name: int(microseconds) / 1e6 for microseconds, name in rows}


if __name__ == "__main__":
    host = seconds("import sae_lens")
    both = seconds("import sae_lens, saelens_ext")
    own = {name: spent for name, spent in both.items() if name not in host}
    added, there = sum(own.values()), sum(spent for name, spent in both.items() if name in host)
    print(json.dumps({"sae_lens_s": there, "saelens_ext_adds_s": added, "ratio": added / there, "modules": len(own)}))
