"""Questions about scikit-learn's handwritten digits, as LLaVA-style data: real images without a download.

    python -m decar.training.data.digits data/digits

Knows nothing about training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from decar.training.data.sources import IMAGE_MARK
from decar.training.stages import replaced_directory

SIDE = 32
DATA_NAME = "train.jsonl"
WHICH = "Which digit is this?"


def write_digits(directory: Path, seed: int = 0, limit: int | None = None) -> int:
    """Write ``directory``/train.jsonl and its images, replacing the directory; return the number of rows.

    Of each image it is asked which digit it shows, whether that is even and whether it is greater than 4; of each two
    images, whose pairs are disjoint, which shows the greater one. The order is drawn by ``seed``.

    Args:
        limit: so many images of the 1,797, drawn by ``seed``.
    """
    from PIL.Image import Resampling, fromarray
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(digits.images))[:limit]
    rows = []
    with replaced_directory(directory) as target:
        (target / "images").mkdir()
        for number in chosen:
            small = fromarray((digits.images[number] * (255 / 16)).round().astype(np.uint8))
            picture = small.resize((SIDE, SIDE), Resampling.BICUBIC).convert("RGB")
            picture.save(target / _name(number))
            rows += _about_one(number, int(digits.target[number]))
        for one, other in zip(chosen[::2], chosen[1::2], strict=False):
            greater = digits.target[one] > digits.target[other]
            rows.append(
                _row([one, other], "Is the first digit greater than the second?", _yes_or_no(greater))
            )
        lines = [
            json.dumps({"id": f"{id:05}", **rows[place]})
            for id, place in enumerate(rng.permutation(len(rows)))
        ]
        (target / DATA_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(rows)


def _about_one(number: int, digit: int) -> list[dict[str, Any]]:
    return [
        _row([number], WHICH, str(digit)),
        _row([number], "Is it even?", _yes_or_no(digit % 2 == 0)),
        _row([number], "Is it greater than 4?", _yes_or_no(digit > 4)),
    ]


def _row(numbers: list[int], question: str, answer: str) -> dict[str, Any]:
    names = [_name(number) for number in numbers]
    return {
        "image": names[0] if len(names) == 1 else names,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_MARK}\n" * len(names) + question},
            {"from": "gpt", "value": answer},
        ],
    }


def _name(number: int) -> str:
    return f"images/{number:04}.png"


def _yes_or_no(true: bool) -> str:
    return "yes" if true else "no"


def main(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="made anew")],
    seed: Annotated[int, typer.Option(help="of the order of rows and pairs")] = 0,
) -> None:
    """Write scikit-learn's digits as questions and answers in LLaVA's format."""
    if directory.exists() and not (directory / DATA_NAME).is_file():
        raise typer.BadParameter(f"{directory} exists and holds no {DATA_NAME}; name another directory")
    typer.echo(f"{directory / DATA_NAME}: {write_digits(directory, seed):,} rows")


if __name__ == "__main__":
    typer.run(main)
