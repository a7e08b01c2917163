"""The result page of `+experiment=cifar_lenet` from several runs: `python -m experiments.lowrank.lenet RUNS --out FILE`.

The runs: `python train.py -m +experiment=cifar_lenet seed=0,1,2`; RUNS is the sweep's folder below `multirun`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.pages import cell, machine_line, write_whole
from experiments.training.compression import compression_lines

CLASSES = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_TEXT = """
Accuracy on the test split, %, mean ± standard deviation (of a sample). **kB**: the state dict as a file. **Time, 1** and
**time, 64**: of a forward pass of 1 and 64 images on one thread, relative to the original's ({first:.2f} and {second:.2f} ms),
the least of many in turns, median over the runs. The machine had other work to do, and networks of the same shapes
differ by up to 7 %.

- **original**: as trained. **+ epoch**: after one more epoch (AdamW, 1e-3 at the highest, falling to 0), in the factorized
  networks on the factors. The original gets that epoch as well, since the epoch alone helps.
- **EVBMF**: as in the article. conv1 by spatial SVD, conv2 by CP, dense layers by SVD, ranks by EVBMF rounded up to multiples
  of 8, from the weights alone.
- **energy 99 %**: the same kinds, ranks that keep 99 % of the energy of each layer's outputs, fitted to the outputs on 1,024
  random training images without labels.
- **same size**: `factorize(parameters=…)` with as many as EVBMF has left, kinds and ranks by its own choice, fitted likewise.
- **int8**: weights of dense layers by torchao, **int8 dynamic**: their activations too, both of the network after the epoch,
  without compilation. torchao has no int8 convolutions for CPUs: these stay in float32. MACs and parameters are counted before.
"""

_READ = """## What the tables say

- EVBMF with plain factors costs a LeNet a fourth of its accuracy, and one class nearly all of it; an epoch brings most of that
  back, but not all. As many parameters, allocated by `factorize` and fitted to outputs, lose a point without any training;
  they have twice the multiply-accumulates, since CP saves most of these in conv2.
- No scheme is faster at a batch of one, whatever its multiply-accumulates say: a chain of four small layers in the place of one
  is mostly calls. At 64 images the schemes with CP save some of the time.
- 8 bits cost no accuracy here. They shrink files to two fifths or less, and nothing becomes faster: without compilation weights
  are converted in each pass, and dynamic quantization of layers as small as these takes several times as long.
"""


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The page, from the contents of the runs' result files."""
    found = [result["compression"] for result in results]
    milliseconds = [[each["milliseconds"][size] for each in found] for size in ("1", "64")]
    first, second = (sum(values) / len(values) for values in milliseconds)
    seeds = ", ".join(str(result["config"]["seed"]) for result in results)
    return "\n".join(
        [
            "# A LeNet factorized, trained on and quantized",
            "",
            "Written by `python train.py -m +experiment=cifar_lenet seed=0,1,2` and `python -m experiments.lowrank.lenet RUNS`",
            f"{machine_line()}.",
            "",
            f"CIFAR-10, {results[0]['config']['trainer']['max_epochs']} epochs, seeds {seeds}: "
            f"{cell([result['test_acc'] for result in results])} % on the test split.",
            _TEXT.format(first=first, second=second),
            *compression_lines(found, CLASSES),
            "",
            _READ,
            "## What became of each layer (first run)",
            "",
            *(f"**{name}**\n\n```\n" + "\n".join(lines) + "\n```\n" for name, lines in found[0]["reports"].items()),
        ]
    )


def main() -> None:
    """Read the results below a folder and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("experiments/lowrank/lenet.md"), help="default %(default)s")
    options = parser.parse_args()
    paths = sorted(options.runs.glob("**/result.json"))
    write_whole(options.out, page([json.loads(path.read_text("utf-8")) for path in paths]))


if __name__ == "__main__":
    main()
