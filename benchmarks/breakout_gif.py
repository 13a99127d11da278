"""Cuts the README's moving picture out of a film that play_breakout.py made.

    python play_breakout.py --gif --runs-dir runs/film
    python benchmarks/breakout_gif.py runs/film/play_breakout__.../film.gif --start 1360 --frames 300

Writes benchmarks/results/breakout.gif: the frames from --start on (15 of them are a second of the film), enlarged twice.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageSequence

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("film", type=Path, help="the film.gif of a run")
    parser.add_argument("--start", type=int, default=0, help="its first frame to keep")
    parser.add_argument("--frames", type=int, default=300, help="how many to keep")
    args = parser.parse_args()

    film = Image.open(args.film)
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(film)][args.start :][: args.frames]
    frames = [frame.resize((2 * frame.width, 2 * frame.height), Image.Resampling.NEAREST) for frame in frames]
    # Breakout has a dozen colours: one palette for all frames, so that only what moves is stored.
    palette = frames[0].quantize(colors=32)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path = RESULTS / "breakout.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=70, loop=0, optimize=True)
    print(f"{len(frames)} frames, {path.stat().st_size / 1e6:.2f} MB: {path}")


if __name__ == "__main__":
    main()
