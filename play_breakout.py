# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "gymnasium[classic-control]==1.4.0",
#     "imageio[ffmpeg]==2.38.1",
#     "numpy==2.4.6",
#     "opencv-python==5.0.0.93",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""Plays Atari Breakout with a policy that a2c_breakout.py has learnt, scores it, and films it.

    python play_breakout.py                   # life after life, until one scores over 400
    python play_breakout.py --weights runs/a2c_breakout__1__.../weight_end.pth --gif
    python play_breakout.py --random          # needs no policy: a first look at the game
    python play_breakout.py --full-games 100  # 100 whole games: the score that others publish

The policy is a probability for each action, and each action is drawn from it; --greedy takes the
likeliest one instead.

An attempt is one life. It starts with all bricks in place and without no-ops. A whole game is five
lives, as in training: it begins with 1 to 30 no-ops; when a life is lost the bricks stay, the stack
of frames is zeroed and one no-op follows. Its score is the sum over all lives. Attempt or game
number i (from 0) has a seed of its own, seed + i, for its no-ops and its actions: what is played
before it or beside it changes nothing (but for the last bit of a rounded sum, which once in a long
while may draw another action). A game that gets nowhere, because the policy never fires or
the ball meets no brick any more, is ended by the emulator after 108,000 frames, 27,000 decisions.

The film shows the screen after each decision, 15 a second, which is the speed of the game itself.
The emulator is deterministic: the actions are kept, and those of the best attempt or game are
played once more to film it.

Each run leaves args.json, result.json and film.mp4 (with --gif also film.gif, with --random also
first_screen.png) in runs/play_breakout__<seed>__<time>/.

Differs from the book:
- gymnasium instead of gym; a game is over when it is `terminated` (lost) or `truncated` (108,000
  frames).
- The policy sees the maximum of two gray screens, the book's policy the gray of the maximum of two
  coloured ones: a few levels apart, and weights of either play with both.
- The actions are kept instead of the frames of every attempt, which would take gigabytes.
"""

import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

# A thread of PyTorch that waits must not spin (on Linux): with the other cores busy, one frame at a
# time took 20 times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import ale_py
import cv2
import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

PACKAGES = ("ale-py", "gymnasium", "numpy", "opencv-python", "torch")  # for result.json
PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "a2c_breakout.pth"


@dataclass
class Args:
    """Play an Atari game with a policy of a2c_breakout.py, or at random."""

    weights: Path | None = None
    """weights (or a checkpoint), own or book-made; if None, pretrained/a2c_breakout.pth is taken"""
    random: bool = False
    """show what the game looks like: 1000 random decisions, or as many as it lasts"""
    target_score: float = 400
    """play lives until one scores more than this"""
    max_attempts: int = 100
    """play this many lives at most, 1 or more"""
    full_games: int | None = None
    """play this many whole games of all lives instead, 1 or more"""
    greedy: bool = False
    """take the most likely action instead of drawing one; attempts are alike then: one is played"""
    gif: bool = False
    """film a GIF as well, in the screen's own size of 160 x 210"""
    env_id: str = "BreakoutNoFrameskip-v4"
    """an Atari game of ale-py that does not skip frames itself: <Game>NoFrameskip-v4"""
    seed: int = 10_000
    """seed of the first game; game i has seed + i. 0 or more; training uses 1 to 16"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network lives; auto takes CUDA when there is one"""
    runs_dir: Path = Path("runs")
    """folder in which the run's own folder is made"""


@dataclass
class Result:
    """What result.json says of a run. One score for each attempt or game, in the order of seeds."""

    seed: int
    seconds: float  # of playing, without the filming
    versions: dict[str, str]
    scores: list[float]
    mean: float
    std: float
    min: float
    max: float


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def check(args: Args) -> None:
    """Refuses values that make no sense (a NaN fails every comparison, so it is refused too)."""
    alone = args.weights is None and args.full_games is None and not args.greedy
    for flag, good, meaning in [
        ("--seed", 0 <= args.seed < 2**31, "from 0 to below 2147483648"),
        ("--target-score", -math.inf < args.target_score < math.inf, "finite"),
        ("--max-attempts", args.max_attempts >= 1, "1 or more"),
        ("--full-games", args.full_games is None or args.full_games >= 1, "1 or more"),
        ("--device", args.device != "cuda" or torch.cuda.is_available(),
         "auto or cpu on a machine without CUDA"),
    ]:  # fmt: skip
        if not good:
            value = getattr(args, flag[2:].replace("-", "_"))
            raise UserError(f"{flag} must be {meaning}, not {value}")
    if args.random and not alone:
        raise UserError("--random goes without --weights, --full-games and --greedy")


# ---- the game: four wrappers and a stack of frames ---------------------------------------------


class NoopReset(gym.Wrapper):
    """Begins each game with 1 to 30 no-ops, so that no two are alike (Mnih et al. 2015, Methods)."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, 31)):
            observation, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                observation, info = self.env.reset()
        return observation, info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames; the observation is the gray maximum of the last two screens, (210, 160) uint8.

    The Atari draws some sprites in every other frame only: the brighter of two pixels shows them all.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.screens = np.zeros((2, *self.unwrapped.ale.getScreenDims()), np.uint8)

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        self.unwrapped.ale.getScreenGrayscale(self.screens[0])
        self.screens[1] = 0
        return self.screens[0], info

    def step(self, action):
        total_reward = 0.0
        for frame in range(4):
            _, reward, terminated, truncated, info = self.env.step(action)
            total_reward += reward
            if terminated or truncated:
                break
            if frame >= 2:
                self.unwrapped.ale.getScreenGrayscale(self.screens[3 - frame])
        np.maximum(self.screens[0], self.screens[1], out=self.screens[0])
        return self.screens[0], total_reward, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """Ends the episode when a life is lost, so that the loss is felt; the game itself goes on to its last life.

    When a life ends, info["life"] is its return; when a game ends, info["game"] is the return and the length (in
    decisions) of all its lives together. The no-op of a reset can end a game too.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.game = {"game_over": True, "lives": 0, "life_return": 0.0, "game_return": 0.0, "game_length": 0}

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        now, lives = self.game, self.unwrapped.ale.lives()
        life_over = 0 < lives < now["lives"]  # Qbert shows 0 lives for some frames before the game is over
        now["lives"], now["game_over"] = lives, terminated or truncated
        now["life_return"] += reward
        now["game_return"] += reward
        now["game_length"] += 1
        if now["game_over"] or life_over:
            info["life"] = now["life_return"]
        if now["game_over"]:
            info["game"] = (now["game_return"], now["game_length"])
        return observation, reward, terminated or life_over, truncated, info

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        info, now = {}, self.game
        if not now["game_over"] and seed is None:
            observation, _, _, _, info = self.step(0)  # the bricks stay, the game goes on
        if now["game_over"] or seed is not None:
            observation, reset_info = self.env.reset(seed=seed, options=options)
            info |= reset_info
            now.update(game_over=False, lives=self.unwrapped.ale.lives(), game_return=0.0, game_length=0)
        now["life_return"] = 0.0
        return observation, info


class Warp(gym.ObservationWrapper):
    """Shrinks the gray screen to (84, 84)."""

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return cv2.resize(observation, (84, 84), interpolation=cv2.INTER_AREA)


class FrameStack(gym.Wrapper):
    """Shows the last four frames, (84, 84, 4) uint8, the newest last: a single one does not tell where the ball flies.

    The four values of a pixel share one 32-bit word, the oldest in its lowest byte: one shift moves them all. The
    array is the same at every step: who keeps an observation copies it.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
        self.words = np.zeros((84, 84), "<u4")
        self.frames = self.words.view(np.uint8).reshape(84, 84, 4)

    def push(self, frame: np.ndarray) -> np.ndarray:
        self.words >>= 8
        self.words |= frame.astype("<u4") << 24
        return self.frames

    def reset(self, **kwargs):
        frame, info = self.env.reset(**kwargs)
        self.words[:] = 0  # no frame from before the end of an episode
        return self.push(frame), info

    def step(self, action):
        frame, *rest = self.env.step(action)
        return self.push(frame), *rest


def make_game(env_id: str, obs_type: str) -> gym.Env:
    """The game as it is. Raises UserError for anything but an Atari game without frame skip."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    gym.register_envs(ale_py)
    cv2.setNumThreads(1)  # a screen is too small to be worth sharing out
    try:
        spec = gym.spec(env_id)
    except (gym.error.Error, ImportError, ValueError) as error:
        raise UserError(f"--env-id {env_id}: {str(error).splitlines()[0]}") from None
    wanted = {"frameskip": 1, "repeat_action_probability": 0.0}  # whatever skips or repeats is a wrapper's business
    if spec.entry_point != "ale_py.env:AtariEnv" or not wanted.items() <= spec.kwargs.items():
        meaning = "an Atari game without frame skip, <Game>NoFrameskip-v4"
        raise UserError(f"--env-id must be {meaning}, not {env_id}")
    return gym.make(env_id, obs_type=obs_type, disable_env_checker=True)


def make_env(env_id: str, whole_games: bool) -> gym.Env:
    """The game as the policy sees it. Whole games begin with no-ops, as in training."""
    # The screen is read where it is needed; the RAM is the cheapest observation in the meantime.
    env = make_game(env_id, "ram")
    return FrameStack(Warp(EpisodicLife(MaxAndSkip(NoopReset(env) if whole_games else env))))


# ---- the network and its weights ---------------------------------------------------------------


class ActorCritic(nn.Module):
    """The convolutional network of Mnih et al. 2015 with two heads. Its parameters have the book's
    names."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(4, 32, kernel_size=8, stride=4),  # (B, 32, 20, 20)
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, kernel_size=4, stride=2),  # (B, 64, 9, 9)
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, kernel_size=3, stride=1),  # (B, 64, 7, 7)
            nn.ReLU(inplace=True),
            nn.Flatten(),  # (B, 3136)
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(inplace=True),
        ).to(memory_format=torch.channels_last)  # as the frames lie in memory
        self.critic = nn.Linear(512, 1)
        self.actor = nn.Linear(512, num_actions)

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """frames (B, 84, 84, 4) uint8 -> values (B,), logits (B, num_actions)."""
        pixels = frames.permute(0, 3, 1, 2).float().div_(255)  # (B, 4, 84, 84), channels-last
        features = self.conv(pixels)
        return self.critic(features).squeeze(-1), self.actor(features)


def load(path: Path) -> Any:
    """Reads what torch.save wrote, and refuses anything that could run code."""
    try:
        with warnings.catch_warnings():  # one line is enough for a foreign file
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # damage has many faces: IndexError, struct.error, AssertionError ...
        raise UserError(f"cannot read {path}: not a file of weights, or damaged") from None


def load_network(path: Path, num_actions: int) -> ActorCritic:
    """The network with a file's weights, of any float type. Raises UserError if they do not fit."""
    weights = load(path)
    if isinstance(weights, dict) and isinstance(weights.get("network"), dict):
        weights = weights["network"]  # a checkpoint of a training run
    network = ActorCritic(num_actions)
    expected = network.state_dict()
    if not isinstance(weights, dict) or weights.keys() != expected.keys():
        raise UserError(f"{path} does not hold this network: it needs {', '.join(expected)}")
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor) or tensor.shape != expected[name].shape:
            found = tuple(getattr(tensor, "shape", ())) or f"a {type(tensor).__name__}"
            raise UserError(f"{path} does not fit a game of {num_actions} actions: {name} is "
                            f"{found}, not {tuple(expected[name].shape)}")  # fmt: skip
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{path} cannot play: not all of {name} are finite numbers")
    network.load_state_dict(weights)
    return network


# ---- playing -----------------------------------------------------------------------------------


class Game:
    """A whole game, or the first life of one: what is to be seen now, the actions taken so far."""

    def __init__(self, env: gym.Env, seed: int, whole: bool):
        self.env, self.seed, self.whole = env, seed, whole
        self.generator = torch.Generator().manual_seed(seed)  # draws the actions of this game alone
        self.frames, _ = env.reset(seed=seed)  # a seed makes it a real reset: all bricks, all lives
        self.actions: list[int] = []
        self.score: float | None = None  # until it is over

    def step(self, action: int) -> None:
        self.actions.append(action)
        self.frames, _, terminated, truncated, info = self.env.step(action)
        if self.whole and (terminated or truncated) and "game" not in info:
            self.frames, info = self.env.reset()  # the next life; its no-op may end the game
        if self.whole and "game" in info:
            self.score, _ = info["game"]
        elif not self.whole and "life" in info:
            self.score = info["life"]


@torch.no_grad()
def act(network: ActorCritic, games: list[Game], greedy: bool, device: torch.device) -> list[int]:
    """An action for each game, drawn from the policy or (greedy) its most likely one."""
    frames = torch.from_numpy(np.stack([game.frames for game in games]))  # (N, 84, 84, 4)
    _, logits = network(frames.to(device))
    if not logits.isfinite().all():
        raise UserError("this policy cannot play: its weights are so large that their sums overflow")
    if greedy:
        return logits.argmax(-1).tolist()
    probs = logits.softmax(-1).cpu()  # (N, num_actions)
    return [
        int(torch.multinomial(p, 1, generator=game.generator)) for p, game in zip(probs, games)
    ]


def play_games(
    network: ActorCritic, envs: list[gym.Env], seeds: range, whole: bool, greedy: bool,
    device: torch.device,
) -> Iterator[Game]:  # fmt: skip
    """Plays a game for each seed, as many at a time as there are environments; yields each at its
    end."""
    free, waiting, playing = envs, iter(seeds), []
    while True:
        playing += [Game(env, seed, whole) for env, seed in zip(free, waiting)]
        if not playing:
            return
        for game, action in zip(playing, act(network, playing, greedy, device)):
            game.step(action)
        over = [game for game in playing if game.score is not None]
        playing = [game for game in playing if game.score is None]
        free = [game.env for game in over]
        yield from over


def replay(game: Game, env: gym.Env) -> Iterator[np.ndarray]:
    """Plays a game once more and yields the real screen, (210, 160, 3), after each decision."""
    again = Game(env, game.seed, game.whole)
    for action in game.actions:
        again.step(action)
        yield env.unwrapped.ale.getScreenRGB()
    assert again.score == game.score, f"{game.score} became {again.score} when played again"


def play_randomly(args: Args, run_dir: Path) -> tuple[float, list[np.ndarray]]:
    """A first look at the game: what there is to see and to do, and how far chance goes. Returns
    the score and the screens."""
    env = make_game(args.env_id, "rgb")
    print(f"observation space: {env.observation_space}")
    print(f"action space:      {env.action_space}")
    print(f"action meanings:   {env.unwrapped.get_action_meanings()}")
    env = MaxAndSkip(env)
    env.reset(seed=args.seed)
    imageio.imwrite(run_dir / "first_screen.png", env.unwrapped.ale.getScreenRGB())
    generator = torch.Generator().manual_seed(args.seed)
    score, screens = 0.0, []  # 100 MB at most
    for action in torch.randint(int(env.action_space.n), (1000,), generator=generator).tolist():
        _, reward, terminated, truncated, _ = env.step(action)
        score += reward
        screens.append(env.unwrapped.ale.getScreenRGB())
        if terminated or truncated:
            break
    print(f"{len(screens)} random decisions scored {score:g}")
    return score, screens


def play_policy(
    args: Args, network: ActorCritic, device: torch.device
) -> tuple[list[Game], Iterator[np.ndarray], bool]:
    """Plays attempts until one is good enough, or whole games. Returns them in the order of their
    seeds, the screens of the best, and whether Ctrl-C cut them short."""
    whole = args.full_games is not None
    if whole:
        kind, count, side_by_side = "game", args.full_games, min(args.full_games, 16)
    else:  # one at a time: whether there is a next attempt depends on this one
        kind, count, side_by_side = "attempt", 1 if args.greedy else args.max_attempts, 1
    envs = [make_env(args.env_id, whole) for _ in range(side_by_side)]
    seeds = range(args.seed, args.seed + count)
    games, interrupted = [], False
    try:
        with tqdm(total=count, unit=kind, leave=False, dynamic_ncols=True, disable=None) as bar:
            for game in play_games(network, envs, seeds, whole, args.greedy, device):
                games.append(game)
                tqdm.write(f"{kind} {game.seed - args.seed + 1}: {game.score:g}")
                bar.update()
                if not whole and game.score > args.target_score:
                    break
    except KeyboardInterrupt:
        interrupted = True
    # The games that were started first count, not those that were over first: they are the short
    # ones. After Ctrl-C these are the games before the first that was not over.
    games.sort(key=lambda game: game.seed)
    games = [game for game, seed in zip(games, seeds) if game.seed == seed]
    if not games:
        raise KeyboardInterrupt
    best = max(games, key=lambda game: game.score)
    if not whole:
        reached = best.score > args.target_score
        verdict = "is reached" if reached else "is missed, the best is filmed all the same"
        print(f"best of {len(games)} attempts: {best.score:g}; "
              f"the target, over {args.target_score:g}, {verdict}")  # fmt: skip
    return games, replay(best, envs[0]), interrupted


# ---- what is kept on disk ----------------------------------------------------------------------


def film(screens: Iterable[np.ndarray], run_dir: Path, gif: bool) -> None:
    """Writes film.mp4, three times as large as the screen, and perhaps film.gif in its own size.

    They get these names when they are whole.
    """
    names = ["film.mp4", "film.gif"] if gif else ["film.mp4"]
    with ExitStack() as stack:
        # Without macro_block_size imageio stretches 480 x 630 to multiples of 16.
        mp4 = imageio.get_writer(run_dir / "part.film.mp4", fps=15, macro_block_size=2)
        writers = [(stack.enter_context(mp4), 3)]
        if gif:  # it counts time in 10 ms; subrectangles stores only what changes
            path = run_dir / "part.film.gif"
            small = imageio.get_writer(path, duration=70, loop=0, subrectangles=True)
            writers.append((stack.enter_context(small), 1))
        for screen in screens:
            for writer, scale in writers:
                writer.append_data(screen.repeat(scale, axis=0).repeat(scale, axis=1))
    for name in names:
        os.replace(run_dir / f"part.{name}", run_dir / name)


def make_run_dir(args: Args) -> Path:
    """Makes runs/<script>__<seed>__<time> and writes args.json into it."""
    name = f"{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = args.runs_dir / name
    try:
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2, default=str))
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror}") from None
    return run_dir


# ---- the run -----------------------------------------------------------------------------------


def play(args: Args) -> Result:
    """Plays; leaves result.json and the film of the best attempt or game in the run's folder.

    Raises UserError. Ctrl-C ends the playing: what is over by then is kept and filmed, and then
    KeyboardInterrupt goes on its way.
    """
    check(args)
    with make_game(args.env_id, "ram") as env:
        num_actions = int(env.action_space.n)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if not args.random:
        if args.weights is None and not PRETRAINED.exists():
            raise UserError(
                f"no policy to play: there is no pretrained one at {PRETRAINED}; "
                f"`python a2c_breakout.py` makes one, --weights takes its file weight_end.pth"
            )
        args = replace(args, weights=args.weights or PRETRAINED)
        network = load_network(args.weights, num_actions).to(device)
    run_dir = make_run_dir(args)

    start = time.perf_counter()
    if args.random:
        score, screens = play_randomly(args, run_dir)
        scores, interrupted = [score], False
    else:
        print(f"{args.env_id}, policy of {args.weights} on {device}")
        games, screens, interrupted = play_policy(args, network, device)
        scores = [game.score for game in games]
    result = Result(
        seed=args.seed,
        seconds=time.perf_counter() - start,
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        scores=scores,
        mean=float(np.mean(scores)),
        std=float(np.std(scores)),
        min=min(scores),
        max=max(scores),
    )
    print(f"scores: {len(scores)}, mean {result.mean:.1f}, standard deviation {result.std:.1f}, "
          f"min {result.min:g}, max {result.max:g}")  # fmt: skip
    (run_dir / "result.json").write_text(json.dumps(asdict(result), indent=2))
    film(screens, run_dir, args.gif)
    print(f"Everything is in {run_dir}")
    if interrupted:
        raise KeyboardInterrupt
    return result


if __name__ == "__main__":
    try:
        play(tyro.cli(Args))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
