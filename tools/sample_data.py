"""Draws a small VOC2007, VOC2012 and CUB_200_2011 in the official layouts: `python -m tools.sample_data`."""

from pathlib import Path

from common.errors import ArgumentParser, exits_on_user_error
from common.sample import draw_sample


@exits_on_user_error
def main() -> None:
    """Command line: draws the sample and tells what is there."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("datasets/sample"), help="folder to draw into (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another sample (%(default)s)")
    args = parser.parse_args()
    draw_sample(args.data, args.seed)
    print(f"{args.data}: drawn from seed {args.seed}")
    for name, pattern in (("VOC2007", "JPEGImages/*"), ("VOC2012", "JPEGImages/*"), ("CUB_200_2011", "images/*/*")):
        print(f"  {name:<12} {len(list((args.data / name).glob(pattern))):5d} images")


if __name__ == "__main__":
    main()
