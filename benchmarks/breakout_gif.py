"""Cuts a moving picture for the README out of a film that play_breakout.py made.

    python play_breakout.py --runs-dir runs/film
    python benchmarks/breakout_gif.py runs/film/play_breakout__.../film.mp4 1560 1860

Writes the film's frames 1560 to 1860 (15 of them are a second) to benchmarks/results/breakout.gif.
"""

import argparse
from itertools import islice
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
from PIL import Image

RESULTS = Path(__file__).resolve().parent / "results"


def save_gif(path: Path, frames: list[np.ndarray], fps: int) -> None:
    """Writes frames, (height, width, 3) uint8 each, as a small GIF that plays for ever.

    One palette for all of them, so that only what moves is stored.
    """
    sample = np.concatenate(frames[:: len(frames) // 12 + 1])
    palette = Image.fromarray(sample).quantize(32, Image.Quantize.FASTOCTREE)
    plain = Image.Dither.NONE
    images = [Image.fromarray(frame).quantize(palette=palette, dither=plain) for frame in frames]
    duration = round(100 / fps) * 10  # a GIF counts in 10 ms
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0)
    print(f"{len(frames)} frames, {path.stat().st_size / 1e6:.2f} MB: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("film", type=Path, help="the film.mp4 of a run")
    parser.add_argument("start", type=int, help="the first frame to keep")
    parser.add_argument("end", type=int, help="the first frame not to keep")
    args = parser.parse_args()

    film = islice(imageio.get_reader(args.film), args.start, args.end)
    screens = [frame[1::3, 1::3] for frame in film]  # 480 x 630 shows each pixel nine times
    if not screens:
        parser.error(f"{args.film} has no frames {args.start} to {args.end}")
    save_gif(RESULTS / "breakout.gif", [s.repeat(2, 0).repeat(2, 1) for s in screens], fps=15)


if __name__ == "__main__":
    main()
