"""Writes docs/paper.md: the paper's "# Params (%)" beside what its recipes here come to.

Run it from the top of the repository: python docs/make_paper.py
"""

from __future__ import annotations

from pathlib import Path

from wda.sweeps import load_runs
from wda.training.blueprint import blueprint, count

RECIPES = Path(__file__).parent.parent / "wda/recipes/paper"

# Recipe → its share of trained parameters as the paper prints it, in percent.
PRINTED = {
    "commonsense-llama-7b-prefix": "0.11",
    "commonsense-llama-7b-series": "0.99",
    "commonsense-llama-7b-parallel": "3.54",
    "commonsense-llama-7b-lora": "0.83",
    "commonsense-llama-7b-dora-half": "0.43",
    "commonsense-llama-7b-dora": "0.84",
    "commonsense-llama-13b-prefix": "0.03",
    "commonsense-llama-13b-series": "0.80",
    "commonsense-llama-13b-parallel": "2.89",
    "commonsense-llama-13b-lora": "0.67",
    "commonsense-llama-13b-dora-half": "0.35",
    "commonsense-llama-13b-dora": "0.68",
    "commonsense-llama2-7b-lora": "0.83",
    "commonsense-llama2-7b-dora-half": "0.43",
    "commonsense-llama2-7b-dora": "0.84",
    "commonsense-llama3-8b-lora": "0.70",
    "commonsense-llama3-8b-dora-half": "0.35",
    "commonsense-llama3-8b-dora": "0.71",
    "granularity-llama-7b": "0.39",
    "granularity-llama-13b": "0.31",
    "alpaca-llama-7b-lora": "2.31",
    "alpaca-llama-7b-dora": "2.33",
    "alpaca-llama-7b-vera": "0.02",
    "alpaca-llama-7b-dvora": "0.04",
    "alpaca-llama2-7b-lora": "2.31",
    "alpaca-llama2-7b-dora": "2.33",
    "alpaca-llama2-7b-vera": "0.02",
    "alpaca-llama2-7b-dvora": "0.04",
    "llava-1.5-7b-ft": "100",
    "llava-1.5-7b-lora": "4.61",
    "llava-1.5-7b-dora": "4.63",
    "vl-bart-image-ft": "100",
    "vl-bart-image-lora": "5.93",
    "vl-bart-image-dora": "5.96",
    "vl-bart-video-ft": "100",
    "vl-bart-video-lora": "5.17",
    "vl-bart-video-dora": "5.19",
}

# What is not the paper's number to two digits, rounded or cut off, and why.
DIFFERENT = {
    "commonsense-llama3-8b-dora-half": "the paper prints half of LoRA's 0.70",
    "vl-bart-image-lora": "BART alone; the paper also trains biases, norms, layers for images",
    "vl-bart-image-dora": "BART alone, as for LoRA; the magnitudes add 0.02, in the paper 0.03",
    "vl-bart-video-lora": "BART alone; the paper counts another base and other layers for videos",
    "vl-bart-video-dora": "BART alone, as for LoRA; the magnitudes add 0.02, as in the paper",
}

HEAD = """# The paper's settings as recipes

One recipe for each row of the DoRA paper's tables ([arXiv
2402.09353](https://arxiv.org/abs/2402.09353)), in [wda/recipes/paper](../wda/recipes/paper). `wda
params` builds each model from its configuration alone, puts the method in and counts; the paper's
column "# Params (%)" is beside it. This page is made by `python docs/make_paper.py`, and the test
suite holds it to the paper.

```bash
wda params pkg://wda/recipes/paper/commonsense-llama-7b-dora.yaml
wda train pkg://wda/recipes/paper/commonsense-llama-7b-dora.yaml --dry-run
```

`--dry-run` checks columns, model and settings, and tells memory, time and room on disk. None of
the recipes was trained to its end here: there was neither a GPU of that size nor a way to the
models. Those of LLaVA, VL-BART and Stable Diffusion XL are for counting, since wda trains no
models of images; the last needs `pip install diffusers`.
"""

FOOT = """
The paper sometimes rounds and sometimes cuts off (2.318 is printed as 2.31, 0.826 as 0.83); a
number that either gives counts as the same. What else there is to know:

* **Prefix.** The paper does not print how many virtual tokens there are. 30 give the share of
  LLaMA-7B, 10 that of LLaMA-13B.
* **Series and Parallel.** A bottleneck of 256 after the down projection of every layer, and
  beside the up and the down projection, gives their shares.
* **LLaVA.** LoRA of rank 128 on the seven projections of the language model, its connector
  trained whole, and the image encoder counted among all parameters, gives 4.61 and 4.63. Full
  fine-tuning leaves the image encoder as it is, and the paper calls that 100.
* **VL-BART.** The recipes count LoRA in BART-base, self-attention and cross-attention, as the
  released code has it: 7.08 of 146.5 million. That code also trains all biases and norms (0.15
  million) and the layers that bring images in (1.58 million): (7.08 + 0.15 + 1.58) / (139.4 +
  1.58 + 7.08) is 5.95 %, where the paper prints 5.93. Table 9 names query and key; the text and
  the code say query and value.
* **What the paper does not print.** LoRA's learning rate is that of LLM-Adapters, 3e-4, which the
  released code names too; α of the recipes for Alpaca is 2r, as elsewhere. The settings for
  Orca-Math are those of the released script, on six of the seven projections; those for Stable
  Diffusion XL are those of the example of diffusers.
* **Prompts have no part in the loss** here. LLM-Adapters, which the paper trains with, lets them
  by default.
"""


def rows() -> list[tuple[str, float, str, str]]:
    """Give recipe, share in percent, the paper's, and what there is to say, for every run."""
    found = []
    for file in sorted(RECIPES.glob("*.yaml")):
        for run in load_runs(file):
            share = 100 * count(blueprint(run.recipe)).share
            name = run.name if run.name == file.stem else f"{file.stem}: {run.name}"
            found.append((name, share, PRINTED.get(name, ""), DIFFERENT.get(name, "")))
    return found


def render() -> str:
    """Give the page."""
    lines = ["| recipe | # Params (%) | paper | |", "| --- | ---: | ---: | --- |"]
    lines += [f"| {name} | {share:.4g} | {paper} | {why} |" for name, share, paper, why in rows()]
    return HEAD + "\n" + "\n".join(lines) + "\n" + FOOT


if __name__ == "__main__":
    Path("docs/paper.md").write_text(render(), encoding="utf-8")
