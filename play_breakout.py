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

    python play_breakout.py                     # life after life, until one scores over 400
    python play_breakout.py --max-attempts 5    # five lives at most: a film in a minute
    python play_breakout.py --weights runs/a2c_breakout__1__.../weight_end.pth --gif
    python play_breakout.py --full-games 100    # whole games: the score that others publish
    python play_breakout.py --random            # needs no policy: a first look at the game

The policy is a probability for each action, and each action is drawn from it; --greedy takes the
most likely one instead.

An attempt is one life, with all bricks in place and no no-ops at its start. A whole game is five
lives, as in training: 1 to 30 no-ops, then, after each lost life, the same bricks, one more no-op
and an empty frame stack; its score is the sum over all lives. Attempt or game number i (from 1) is
seeded with seed + i - 1 for its actions and no-ops, so that it is the same, up to rounding,
whatever is played before it or beside it. A game that never ends, because the policy does not serve
or the ball meets no brick any more, is cut after 65,536 frames, 18 minutes: from then on Breakout
serves no ball. Other games are cut after 108,000.

Each run leaves args.json, result.json and film.mp4 (with --gif also film.gif, with --random also
first_screen.png) in runs/play_breakout__<seed>__<time>/. The film shows the screen after each
decision at the speed of the game itself, 15 a second. The emulator is deterministic, so only the
actions are kept, and those of the best attempt or game are played once more for the film.

Environment and network are those of a2c_breakout.py, repeated so that this file runs alone.

Differs from the book (Yutaro Ogawa, つくりながら学ぶ！深層強化学習, 2018): gymnasium instead of gym (a game
ends `terminated`, lost, or `truncated`, at the frame limit); screens are turned gray before, not
after, the maximum of two is taken. A few gray levels differ: weights of either play in both.
"""

import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import ale_py
import cv2
import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "a2c_breakout.pth"


@dataclass
class Args:
    """Play an Atari game with a policy of a2c_breakout.py, or at random."""

    weights: Path = PRETRAINED  # weights or checkpoint of a run, or weights of the book
    random: bool = False  # show what the game looks like: at most 1000 random decisions
    target_score: float = 400  # play lives until one scores more than this
    max_attempts: int = 100  # lives to play at most, 1 or more
    full_games: int | None = None  # whole games to play instead, 1 or more
    greedy: bool = False  # take the most likely action; all lives are alike then: one is played
    gif: bool = False  # film a GIF as well, in the screen's own size of 160 x 210
    env_id: str = "BreakoutNoFrameskip-v4"  # or another <Game>NoFrameskip-v4 of ale-py
    seed: int = 10_000  # of the first attempt or game, the next has seed + 1; 0 or more
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    runs_dir: Path = Path("runs")  # folder in which the run's own folder is made

    def __post_init__(self):  # tyro shows the message
        a_policy = self.weights != PRETRAINED or self.full_games is not None or self.greedy
        for good, rule in [
            (math.isfinite(self.target_score), "--target-score must be finite"),
            (self.max_attempts >= 1, "--max-attempts must be 1 or more"),
            (self.full_games is None or self.full_games >= 1, "--full-games must be 1 or more"),
            (0 <= self.seed < 2**31, "--seed must be from 0 to 2**31 - 1"),
            (self.device != "cuda" or torch.cuda.is_available(), "--device: there is no CUDA here"),
            (not (self.random and a_policy), "--random takes no --weights, --full-games, --greedy"),
        ]:
            if not good:
                raise ValueError(rule)


# ---- environment ---------------------------------------------------------------


class NoopReset(gym.Wrapper):
    """Begins a game with 1 to 30 no-ops, so that not all games begin alike (Mnih et al. 2015)."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, 31)):
            observation, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                observation, info = self.env.reset()
        return observation, info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames and shows the maximum of the last two, (210, 160) uint8, gray.

    The Atari draws some sprites in every other frame only: the brighter of two pixels shows them.
    The screens are those of gymnasium.wrappers.AtariPreprocessing, bit for bit.
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
    """Ends the episode when a life is lost, so that losing it has a cost; the game goes on.

    When a whole game ends, info["game"] is its score and its length in decisions. A game also ends
    after max_idle_steps decisions without a reward (in training; 0: never).
    """

    def __init__(self, env: gym.Env, max_idle_steps: int = 0):
        super().__init__(env)
        self.max_idle_steps = max_idle_steps
        self.game = {"over": True}  # reset() adds lives, score, length, idle

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        game, lives_before = self.game, self.game["lives"]
        game["lives"] = self.unwrapped.ale.lives()
        game["score"] += reward
        game["length"] += 1
        game["idle"] = 0 if reward else game["idle"] + 1
        truncated = truncated or 0 < self.max_idle_steps <= game["idle"]
        game["over"] = terminated or truncated
        if game["over"]:
            info["game"] = (game["score"], game["length"])
        # Qbert shows 0 lives for some frames before its game is over.
        life_lost = 0 < game["lives"] < lives_before
        return observation, reward, terminated or life_lost, truncated, info

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        info = {}
        if seed is None and not self.game["over"]:
            observation, _, _, _, info = self.step(0)  # the next life begins with a no-op
        if seed is not None or self.game["over"]:  # the no-op, too, can end a game
            observation, _ = self.env.reset(seed=seed, options=options)
            lives = self.unwrapped.ale.lives()
            self.game = {"over": False, "lives": lives, "score": 0.0, "length": 0, "idle": 0}
        return observation, info


class Warp(gym.ObservationWrapper):
    """Shrinks the gray screen to (84, 84)."""

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return cv2.resize(observation, (84, 84), interpolation=cv2.INTER_AREA)


class FrameStack(gym.Wrapper):
    """Shows the last four frames, (4, 84, 84) uint8, the newest last: a single one shows no motion.

    The array is the same at every step: copy it if you keep it.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.frames = np.zeros((4, 84, 84), np.uint8)

    def reset(self, **kwargs):
        frame, info = self.env.reset(**kwargs)
        self.frames[:] = 0  # nothing of the life before
        self.frames[-1] = frame
        return self.frames, info

    def step(self, action):
        frame, reward, terminated, truncated, info = self.env.step(action)
        self.frames[:-1] = self.frames[1:]
        self.frames[-1] = frame
        return self.frames, reward, terminated, truncated, info


def make_game(env_id: str, obs_type: str = "ram") -> gym.Env:
    """The bare game; ValueError for anything but an Atari game without frame skip."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    gym.register_envs(ale_py)
    if env_id not in gym.registry or not env_id.endswith("NoFrameskip-v4"):
        raise ValueError(f"--env-id {env_id}: not a game of ale-py, <Game>NoFrameskip-v4")
    # From frame 65,536 on, Breakout's cartridge serves no ball. Other games may last 108,000.
    max_frames = 65_536 if env_id.startswith("Breakout") else 108_000
    # MaxAndSkip reads the screen itself; RAM is the cheapest observation to ask for.
    return gym.make(
        env_id, obs_type=obs_type, max_num_frames_per_episode=max_frames, disable_env_checker=True
    )


def make_env(env_id: str, whole_games: bool) -> gym.Env:
    """The game as the policy sees it. Whole games begin with no-ops, as in training."""
    env = make_game(env_id)
    return FrameStack(Warp(EpisodicLife(MaxAndSkip(NoopReset(env) if whole_games else env))))


# ---- network -------------------------------------------------------------------


class ActorCritic(nn.Module):
    """The network of Mnih et al. 2015 with two heads; named as in the book, whose weights load."""

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
        ).to(memory_format=torch.channels_last)  # faster
        self.critic = nn.Linear(512, 1)
        self.actor = nn.Linear(512, num_actions)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """observations (B, 4, 84, 84) uint8 -> values (B,), logits (B, num_actions)."""
        features = self.conv(observations / 255)  # (B, 512)
        return self.critic(features).squeeze(-1), self.actor(features)


def load_network(path: Path, num_actions: int) -> ActorCritic:
    """The network with the weights of a file; ValueError if they do not fit."""
    if not path.is_file():
        how = "`python a2c_breakout.py` makes one, weight_end.pth, and --weights FILE plays it"
        raise ValueError(f"there is no policy at {path}: {how}")
    network = ActorCritic(num_actions)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # runs no code in it
        network.load_state_dict(weights.get("averaged", weights))  # a checkpoint, or weights
    except Exception:  # damage makes torch.load raise nearly anything
        what = f"the weights of a network for {num_actions} actions"
        raise ValueError(f"{path} cannot be read, is damaged, or does not hold {what}") from None
    if not all(weight.isfinite().all() for weight in network.parameters()):
        raise ValueError(f"{path} cannot play: not all of its weights are finite numbers")
    return network


# ---- playing -------------------------------------------------------------------


class Game:
    """A whole game, or one life: the frames it shows now, the actions so far, the score."""

    def __init__(self, env: gym.Env, seed: int, whole: bool):
        self.env, self.seed, self.whole = env, seed, whole
        self.frames, _ = env.reset(seed=seed)  # with a seed it is a new game: all bricks, all lives
        self.actions: list[int] = []
        self.score: float | None = None  # None until it is over

    def step(self, action: int) -> None:
        self.actions.append(action)
        self.frames, _, terminated, truncated, _ = self.env.step(action)
        if terminated or truncated:
            status = self.env.get_wrapper_attr("game")  # kept: reset() may begin a new game
            if self.whole and not status["over"]:
                self.frames, _ = self.env.reset()  # the next life; its no-op may end the game
            if status["over"] or not self.whole:
                self.score = status["score"]


@torch.no_grad()
def act(network: nn.Module, games: list[Game], greedy: bool, device: str) -> list[int]:
    """An action for each game: drawn from the policy, or with greedy the most likely one."""
    observations = torch.from_numpy(np.stack([game.frames for game in games]))  # (N, 4, 84, 84)
    logits = network(observations.to(device))[1].cpu().numpy()  # (N, num_actions)
    if not np.isfinite(logits).all():
        raise ValueError("this policy cannot play: its weights are so large that they overflow")
    if not greedy:
        # argmax(logits + Gumbel noise) is a draw from softmax(logits): each game draws by itself.
        noise = [game.env.unwrapped.np_random.gumbel(size=logits.shape[1]) for game in games]
        logits = logits + noise
    return logits.argmax(axis=-1).tolist()


def play_policy(args: Args, network: nn.Module, device: str) -> tuple[list[Game], bool]:
    """Plays lives until one is good enough, or whole games; returns those that ended, by seed.

    The second value is True if Ctrl-C cut it short.
    """
    whole = args.full_games is not None
    count = args.full_games or (1 if args.greedy else args.max_attempts)
    kind, target = ("game", math.inf) if whole else ("attempt", args.target_score)
    seeds = range(args.seed, args.seed + count)
    # 16 games at a time are faster. Attempts come one by one: a good one is the last.
    num_envs = min(count, 16) if whole else 1
    free = [make_env(args.env_id, whole) for _ in range(num_envs)]
    waiting, playing, games, interrupted = iter(seeds), [], [], False
    try:
        with tqdm(total=count, unit=kind, leave=False, disable=None) as bar:
            while len(games) < count and all(game.score <= target for game in games):
                # zip asks free before waiting: the other way round a seed would be lost.
                playing += [Game(env, seed, whole) for env, seed in zip(free, waiting)]
                for game, action in zip(playing, act(network, playing, args.greedy, device)):
                    game.step(action)
                over = [game for game in playing if game.score is not None]
                playing = [game for game in playing if game.score is None]
                free = [game.env for game in over]
                games += over
                for game in over:
                    tqdm.write(f"{kind} {game.seed - args.seed + 1}: {game.score:g}")
                bar.update(len(over))
    except KeyboardInterrupt:
        interrupted = True
    # Ctrl-C loses the long games first, and the mean would favour the short ones: so only the
    # games before the first one that is missing count.
    games.sort(key=lambda game: game.seed)
    games = [game for game, seed in zip(games, seeds) if game.seed == seed]
    if not games:
        raise KeyboardInterrupt  # there is nothing to keep
    if not whole:
        best = max(game.score for game in games)
        print(f"best of {len(games)} attempts: {best:g} (the target: over {target:g})")
    return games, interrupted


def replay(game: Game) -> Iterator[np.ndarray]:
    """Plays a game once more and yields the screen, (210, 160, 3) uint8, after each decision."""
    # The seed decides the no-ops at the start; after it the actions alone decide.
    again = Game(game.env, game.seed, game.whole)
    for action in game.actions:
        again.step(action)
        yield game.env.unwrapped.ale.getScreenRGB()
    assert again.score == game.score, f"{game.score} became {again.score} when played again"


def play_randomly(args: Args, run_dir: Path) -> tuple[float, list[np.ndarray]]:
    """A first look at the game and at what chance scores; returns the score and the screens."""
    bare = make_game(args.env_id, "rgb")
    print(f"observation space: {bare.observation_space}")
    print(f"action space:      {bare.action_space}")
    print(f"action meanings:   {bare.unwrapped.get_action_meanings()}")
    if args.env_id.startswith("Breakout"):
        print("On the screen: the score, the lives that are left, the number of players.")
        print("NOOP does nothing, FIRE serves the ball, RIGHT and LEFT move the paddle.")
    env = MaxAndSkip(bare)  # for its four frames a decision
    env.reset(seed=args.seed)
    ale = bare.unwrapped.ale
    imageio.imwrite(run_dir / "first_screen.png", ale.getScreenRGB())
    rng = np.random.default_rng(args.seed)
    score, screens = 0.0, []  # 100 MB at most
    for action in rng.integers(bare.action_space.n, size=1000):
        _, reward, terminated, truncated, _ = env.step(action)
        score += reward
        screens.append(ale.getScreenRGB())
        if terminated or truncated:
            break
    print(f"{len(screens)} random decisions scored {score:g}")
    return score, screens


# ---- the run -------------------------------------------------------------------


def film(screens: Iterable[np.ndarray], run_dir: Path, gif: bool) -> None:
    """Writes film.mp4, three times as large as the screen, and with gif film.gif."""
    # By default imageio would stretch 480 x 630 to multiples of 16.
    writers = [imageio.get_writer(run_dir / "part.mp4", fps=15, macro_block_size=2)]
    if gif:  # 70 ms a frame: GIF counts in tens; subrectangles stores only what changes
        options = {"duration": 70, "loop": 0, "subrectangles": True}
        writers.append(imageio.get_writer(run_dir / "part.gif", **options))
    try:
        for screen in screens:
            for writer, scale in zip(writers, (3, 1)):
                writer.append_data(screen.repeat(scale, axis=0).repeat(scale, axis=1))
        for writer in writers:
            writer.close()
        imageio.get_reader(run_dir / "part.mp4").close()  # ffmpeg does not say if it failed
    except OSError:
        raise OSError(f"the film in {run_dir} could not be written: is the disk full?") from None
    for part in run_dir.glob("part.*"):
        part.rename(part.with_stem("film"))  # now it is complete


def play(args: Args) -> dict:
    """Plays, and leaves result.json and the film in the run's folder; returns the result.

    Raises ValueError for bad input and OSError for files. After Ctrl-C while a policy plays, what
    is over by then is kept and filmed, and then KeyboardInterrupt is raised again.
    """
    torch.set_num_threads(1)  # a few frames are too little work for several threads
    cv2.setNumThreads(1)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    with make_game(args.env_id) as env:
        num_actions = int(env.action_space.n)
    if not args.random:
        network = load_network(args.weights, num_actions).to(device)
    name = f"{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = args.runs_dir / name
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2, default=str))

    start, interrupted = time.perf_counter(), False
    if args.random:
        score, screens = play_randomly(args, run_dir)
        scores = [score]
    else:
        print(f"{args.env_id}, policy of {args.weights} on {device}")
        games, interrupted = play_policy(args, network, device)
        scores = [game.score for game in games]
        screens = replay(max(games, key=lambda game: game.score))
    mean, std = float(np.mean(scores)), float(np.std(scores))
    result = {
        "seed": args.seed,
        "seconds": time.perf_counter() - start,
        "versions": {m.__name__: m.__version__ for m in (ale_py, cv2, gym, np, torch)}
        | {"python": platform.python_version()},
    }
    result |= {"scores": scores, "mean": mean, "std": std, "min": min(scores), "max": max(scores)}
    print(
        f"scores: {len(scores)}, mean {mean:.1f}, standard deviation {std:.1f}, "
        f"min {min(scores):g}, max {max(scores):g}"
    )
    (run_dir / "result.json").write_text(json.dumps(result, indent=2))
    film(screens, run_dir, args.gif)
    print(f"Everything is in {run_dir}; the film is film.mp4")
    if interrupted:
        raise KeyboardInterrupt
    return result


if __name__ == "__main__":
    try:
        play(tyro.cli(Args))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
