"""What the quickstart finds, as the table and the picture of the README.

Runs the search (or continues it), writes the best model and scores it again from its folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import lrbo
from lrbo.tasks.metrics import with_error

SMOKE = bool(os.environ.get("LRBO_SMOKE"))
STUDY, EXPERIMENT = ("tiny", "tiny") if SMOKE else ("quickstart", "quickstart")
MODEL = ["model=tiny"] if SMOKE else []
DATA = ["data=generated"] if SMOKE else ["data.test.tokens=8192"]


def main() -> None:
    """Search, compress, evaluate, print the table."""
    result = lrbo.search(f"experiment={EXPERIMENT}").summary
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "best"
        written = lrbo.compress(f"study={STUDY}", f"out={out}")
        scored = lrbo.evaluate(f"checkpoint={out}", *MODEL, *DATA)
    print("| model | kept | validation perplexity | test perplexity |")
    print("|---|---:|---:|---:|")
    tested = result["test"]
    for label in ("dense", "uniform", "analytic", "best"):
        keep_ratio = result[label].get("keep_ratio", 1.0)
        row = f"{result[label]['perplexity']:.2f} | {tested[label]['perplexity']:.2f}"
        print(f"| {label} | {keep_ratio:.1%} | {row} |")
    (gain,) = result["gains"]
    for text in ("validation", "test"):
        difference = with_error(gain[text]["difference"], gain[text]["standard_error"])
        within = "" if gain[text]["is_measurable"] else ", no measurable difference"
        print(f"\nbest - analytic, {text} text: {difference} nats per token{within}")
    print(f"\nbest, read back from its folder: test perplexity {scored['perplexity']:.2f}")
    print(f"parameters of the model {written['parameters']:,}, in the file the same")
    seconds = ", ".join(f"{stage} {spent:.1f}" for stage, spent in result["seconds"].items())
    print(f"seconds: {seconds}")
    if not SMOKE:
        picture = Path("studies") / STUDY / "figures" / "convergence.png"
        shutil.copyfile(picture, Path(__file__).parent / "convergence.png")


if __name__ == "__main__":
    main()
