"""Run the tutorials from top to bottom, and store what they show.

    python tutorials/run.py                 all of them, each saved with its outputs
    python tutorials/run.py --check         run them and save nothing, as a test
    python tutorials/run.py 1_*.ipynb       some of them
    python tutorials/run.py --jobs 2        two at a time, each on half of the cores

A notebook runs in a folder of its own that is deleted afterwards, so what it writes there is gone. Progress bars,
warnings and times are left out of what is saved: they differ from run to run and say nothing about the result.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode

HERE = Path(__file__).parent
TIMEOUT = 1200
"""Seconds that a whole notebook may take."""


def execute(path: Path, timeout: int) -> NotebookNode:
    """The notebook with fresh outputs.

    Raises:
        CellExecutionError: a cell failed.
        CellTimeoutError: the notebook took longer than ``timeout`` seconds.
    """
    notebook = nbformat.read(path, as_version=4)
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            record_timing=False,
        )
        client.execute()
    return notebook


def tidy(notebook: NotebookNode) -> list[str]:
    """Leave out of the outputs what differs from run to run (in place), and give what was left out as text."""
    left_out = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        noise = [output for output in cell.outputs if output.output_type == "stream" and output.name == "stderr"]
        left_out += [output.text for output in noise]
        cell.outputs = [output for output in cell.outputs if output not in noise]
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    return left_out


def run(path: Path, timeout: int, save: bool) -> bool:
    """Run one notebook, say how long it took, and whether it ended well."""
    start = time.perf_counter()
    try:
        notebook = execute(path, timeout)
    except (CellExecutionError, CellTimeoutError) as error:
        print(f"{path.name} FAILED after {time.perf_counter() - start:.0f} s\n{error}", file=sys.stderr)
        return False
    for text in tidy(notebook):
        print(text.strip(), file=sys.stderr)
    if save:
        nbformat.write(notebook, path)
    print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="which; all by default")
    parser.add_argument("--check", action="store_true", help="save nothing")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=int, default=TIMEOUT, help="seconds that a notebook may take (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    # The last ones take longest.
    paths = options.notebooks or sorted(HERE.glob("*.ipynb"), reverse=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        ended_well = list(pool.map(lambda path: run(path, options.timeout, not options.check), paths))
    failed = [path.name for path, well in zip(paths, ended_well, strict=True) if not well]
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
