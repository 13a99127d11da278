# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1", "gymnasium==1.4.0", "imageio[ffmpeg]==2.38.1",
#     "numpy==2.4.6", "opencv-python==5.0.0.93", "torch==2.13.0", "tyro==1.0.17",
# ]
# ///
"""Plays Atari Breakout with a policy that a2c_breakout.py has learnt, scores it, and films it.

    python play_breakout.py                     # single lives, until one scores over 400
    python play_breakout.py --weights runs/a2c_breakout__1__.../weight_end.pth --max-attempts 5
    python play_breakout.py --gif               # film.gif as well
    python play_breakout.py --full-games 100    # whole games: the score that others publish
    python play_breakout.py --random            # needs no policy: a first look at the game

An attempt is one life, with all bricks in place and no no-ops at its start. A whole game is five
lives, as in training: no-ops for 1 to 30 frames; after a lost life the same bricks, four frames of
no-op, an empty frame stack. Its score is the sum; it is cut after 18 minutes (other games: 30).

Each run leaves args.json, result.json and film.mp4, of the best attempt or game, in its own folder.
Environment and network are those of a2c_breakout.py, repeated so that this file runs alone. The
weights of the book (Yutaro Ogawa, つくりながら学ぶ！深層強化学習, 2018) play as well.
"""

import json
import os
import signal
import sys
import time
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

# Beside this file. In a notebook's cell, which has no __file__, it is in the working folder.
PRETRAINED = Path(globals().get("__file__", "x")).resolve().parent / "pretrained/a2c_breakout.pth"


@dataclass  # tyro makes flags of the fields, and help of their comments
class Args:
    """Play an Atari game with a policy of a2c_breakout.py, or at random."""

    weights: Path = PRETRAINED  # weights or checkpoint of a run, or weights of the book
    random: bool = False  # a first look: a whole game at random, and first_screen.png
    target_score: float = 400  # play lives until one scores more than this; 400 is for Breakout
    max_attempts: int = 100  # lives to play at most, 1 or more
    full_games: int | None = None  # whole games to play instead, 1 or more
    greedy: bool = False  # take the most likely action; attempts that are all alike are played once
    gif: bool = False  # film a GIF as well, in the screen's own size of 160 x 210
    env_id: str = "BreakoutNoFrameskip-v4"  # or another <Game>NoFrameskip-v4 of ale-py
    sticky_actions: float = 0.0  # chance per frame that the last action goes on (in papers 0.25)
    seed: int = 10_000  # of the first attempt or game, then seed + 1 and so on; below 2**31
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    runs_dir: Path = Path("runs")  # folder in which the run's own folder is made

    def __post_init__(self):  # tyro shows the error
        self.weights = Path(os.path.expanduser(self.weights))
        self.runs_dir = Path(os.path.expanduser(self.runs_dir))
        a_policy = self.weights != PRETRAINED or self.greedy
        for good, rule in [
            (np.isfinite(self.target_score), "--target-score must be finite"),
            (1 <= self.max_attempts == self.max_attempts // 1, "--max-attempts must be 1, 2, ..."),
            (self.full_games is None or self.full_games >= 1, "--full-games must be 1 or more"),
            ((self.full_games or 1) % 1 == 0, "--full-games must be whole"),
            (0 <= self.sticky_actions < 1, "--sticky-actions must be from 0 to below 1"),
            (0 <= self.seed < 2**31 and self.seed % 1 == 0, "--seed must be whole, 0 to 2**31 - 1"),
            (self.device in ("auto", "cpu", "cuda"), "--device must be auto, cpu or cuda"),
            (self.device != "cuda" or torch.cuda.is_available(), "--device cuda: there is no GPU"),
            (not (self.random and a_policy), "--random takes no --weights and no --greedy"),
        ]:
            if not good:
                raise ValueError(rule)
        self.seed, self.max_attempts = int(self.seed), int(self.max_attempts)  # of NumPy, perhaps
        self.full_games = self.full_games and int(self.full_games)


# ---- environment ---------------------------------------------------------------


class NoopReset(gym.Wrapper):
    """Begins a game with 1 to 30 no-ops, so that not all games begin alike (Mnih et al. 2015)."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, 31)):
            observation, _, _, _, info = self.env.step(0)  # no game is over so soon
        return observation, info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames and shows the maximum of the last two, (210, 160) uint8, gray.

    Some sprites are drawn in every other frame only. AtariPreprocessing does the same, bit for bit.
    """

    def __init__(self, env: gym.Env, sticky_actions: float = 0.0):
        super().__init__(env)
        self.sticky_actions = sticky_actions
        self.screens = np.zeros((2, *self.unwrapped.ale.getScreenDims()), np.uint8)

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        self.unwrapped.ale.getScreenGrayscale(self.screens[0])
        self.screens[1], self.last_action = 0, 0
        return self.screens[0], info

    def step(self, action):
        total_reward = 0.0
        for frame in range(4):
            if self.sticky_actions == 0 or self.np_random.random() >= self.sticky_actions:
                self.last_action = action  # else the one before goes on
            _, reward, terminated, truncated, info = self.env.step(self.last_action)
            total_reward += reward
            if terminated or truncated:
                break
            if frame >= 2:  # the last two go to screens 1 and 0
                self.unwrapped.ale.getScreenGrayscale(self.screens[3 - frame])
        np.maximum(self.screens[0], self.screens[1], out=self.screens[0])
        return self.screens[0], total_reward, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """Ends the episode when a life is lost: that costs the rewards to come. The game goes on.

    When a whole game ends, info["game"] is its score and its length in decisions. A game also ends
    after max_idle_steps decisions without a reward (in training; 0: never).
    """

    def __init__(self, env: gym.Env, max_idle_steps: int = 0):
        super().__init__(env)
        self.max_idle_steps, self.game = max_idle_steps, {"over": True}

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        game, lives = self.game, self.unwrapped.ale.lives()
        life_lost = 0 < lives < game["lives"]  # Qbert shows 0 for some frames before it is over
        game["lives"] = lives
        game["score"] += reward
        game["length"] += 1
        game["idle"] = 0 if reward else game["idle"] + 1
        truncated = truncated or 0 < self.max_idle_steps <= game["idle"]
        game["over"] = terminated or truncated
        if game["over"]:
            info["game"] = (game["score"], game["length"])
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


class FrameStack(gym.ObservationWrapper):
    """Shows the last four screens, (4, 84, 84) uint8, newest last; copy them to keep them."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        self.frames = np.zeros((4, 84, 84), np.uint8)  # a single one would show no motion

    def reset(self, **kwargs):
        self.frames[:] = 0  # nothing of the life before
        return super().reset(**kwargs)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        self.frames[:-1] = self.frames[1:]
        self.frames[-1] = observation
        return self.frames


def make_env(env_id: str, whole_games: bool, sticky_actions: float = 0.0) -> gym.Env:
    """The game in its wrappers; ValueError for anything but an Atari game without frame skip."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    gym.register_envs(ale_py)
    if env_id not in gym.registry or not env_id.endswith("NoFrameskip-v4"):
        raise ValueError(f"--env-id {env_id}: not a game of ale-py, <Game>NoFrameskip-v4")
    frames = 65_536 if env_id.startswith("Breakout") else 108_000  # Breakout serves no ball later
    # MaxAndSkip reads the screen itself; RAM is the cheapest observation to ask for.
    game = gym.make(env_id, obs_type="ram", max_num_frames_per_episode=frames).unwrapped
    screens = MaxAndSkip(NoopReset(game) if whole_games else game, sticky_actions)
    return FrameStack(Warp(EpisodicLife(screens)))


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
        """observations (B, 4, 84, 84) uint8 -> values (B,), logits (B, actions): before softmax."""
        features = self.conv(observations / 255)  # (B, 512)
        return self.critic(features).squeeze(-1), self.actor(features)


def load_network(path: Path, env: gym.Env) -> ActorCritic:
    """The network with the weights of a file or checkpoint; ValueError says why they do not fit."""
    network, env_id = ActorCritic(int(env.action_space.n)), env.unwrapped.spec.id
    try:
        content = torch.load(path, "cpu", weights_only=True)
        weights = content.get("averaged") or content.get("network") or content
    except Exception as error:  # a damaged file can raise nearly anything
        why = f"is missing, damaged, or holds no weights ({type(error).__name__})"
        raise ValueError(f"--weights: {path} {why}; `python a2c_breakout.py` makes some") from error
    if content.get("env_id", env_id) != env_id:  # weights alone do not name their game
        raise ValueError(f"--weights: {path} wants --env-id {content['env_id']}")
    try:
        network.load_state_dict(weights)
    except Exception as error:
        reason = str(error).rpartition("\n")[2].strip()  # the last line names a weight, and sizes
        raise ValueError(f"--weights: {path} does not fit {env_id}: {reason}") from error
    return network


# ---- playing and filming -------------------------------------------------------


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
            status = self.env.get_wrapper_attr("game")  # taken before a new game begins
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
        raise ValueError("--weights: not all are finite, or they are so large that they overflow")
    # argmax(logits + Gumbel noise) is a draw from softmax(logits). film() draws the noise again.
    noise = [game.env.np_random.gumbel(size=logits.shape[1]) for game in games]
    return (logits if greedy else logits + noise).argmax(axis=-1).tolist()


def save(path: Path, content: bytes) -> None:
    """Writes a .part file, then renames it: a full disk or a kill leaves no half file."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def say(text: str) -> None:
    """Prints at once. If nobody reads it (`| head`, a closed terminal), play goes on."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = None  # print does nothing now; else Python's exit would try once more


def film(game: Game, path: Path, zoom: int, **options) -> None:
    """Plays a game's actions once more and films them; OSError whatever goes wrong."""
    part = path.with_name("part.mp4")  # a GIF too: imageio keeps all frames of a .gif in memory
    try:
        again = Game(game.env, game.seed, game.whole)
        with imageio.get_writer(part, fps=15, macro_block_size=2, **options) as video:
            for action in game.actions:
                again.env.np_random.gumbel(size=again.env.action_space.n)  # as act did
                again.step(action)
                screen = again.env.unwrapped.ale.getScreenRGB()  # (210, 160, 3) uint8
                video.append_data(screen.repeat(zoom, axis=0).repeat(zoom, axis=1))
        if round(imageio.get_reader(part).get_meta_data()["duration"] * 15) < len(game.actions):
            raise OSError("its end is missing")  # ffmpeg does not say if it failed
        part.replace(path)
    except Exception as error:
        why = f"imageio or ffmpeg failed: {error}".partition("\n")[0]
        raise OSError(f"no film: {why}; everything else is in {path.parent}") from error
    finally:
        part.unlink(missing_ok=True)


def play(args: Args) -> dict:
    """Plays, and leaves result.json and the film in the run's folder; returns the result.

    After Ctrl-C the batches that are over are kept, their best is filmed, KeyboardInterrupt raised.
    """
    whole = args.random or args.full_games is not None
    once = args.random or (args.greedy and args.sticky_actions == 0)  # greedy ones are alike
    count = args.full_games or (1 if once else args.max_attempts)
    num_envs = min(count, 16) if whole else 1  # 16 at a time are faster; attempts come one by one
    envs = [make_env(args.env_id, whole, args.sticky_actions) for _ in range(num_envs)]
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.random:  # no values, and the same logit for each action
        network = lambda frames: (None, torch.zeros(len(frames), envs[0].action_space.n))
    else:
        network = load_network(args.weights, envs[0]).to(device)
    run_dir = args.runs_dir / f"play_breakout__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)
    save(run_dir / "args.json", json.dumps(asdict(args), indent=2, default=str).encode())
    say(f"{args.env_id} on {device}, in {run_dir}")
    if args.random:
        envs[0].reset(seed=args.seed)
        screen = envs[0].unwrapped.ale.getScreenRGB()
        save(run_dir / "first_screen.png", imageio.imwrite("<bytes>", screen, format="png"))
        say(f"actions: {', '.join(envs[0].unwrapped.get_action_meanings())}")
        if args.env_id.startswith("Breakout"):
            say("NOOP does nothing, FIRE serves the ball, RIGHT and LEFT move the paddle.")
            say("On the screen: the score, the lives that are left, the number of players.")

    kind = "game" if whole else "attempt"
    versions = {module.__name__: module.__version__ for module in (ale_py, cv2, gym, np, torch)}
    versions["python"] = sys.version.split()[0]
    start, games, result, interrupted = time.perf_counter(), [], {}, False
    try:
        while len(games) < count and (whole or all(g.score <= args.target_score for g in games)):
            seeds = range(args.seed + len(games), args.seed + count)
            batch = [Game(env, seed, whole) for env, seed in zip(envs, seeds)]
            while playing := [game for game in batch if game.score is None]:
                for game, action in zip(playing, act(network, playing, args.greedy, device)):
                    game.step(action)
            games += batch  # whole batches only: Ctrl-C must not leave out the long games
            scores = [game.score for game in games]
            mean, std, low, high = np.mean(scores), np.std(scores), min(scores), max(scores)
            result = dict(seed=args.seed, seconds=time.perf_counter() - start, versions=versions)
            result |= dict(scores=scores, mean=float(mean), std=float(std), min=low, max=high)
            save(run_dir / "result.json", json.dumps(result, indent=2).encode())
            for game in batch:
                say(f"{kind} {game.seed - args.seed + 1}: {game.score:.0f}")
    except KeyboardInterrupt:
        interrupted = True
        if not result:
            raise  # there is nothing to keep
    say(f"mean {mean:.1f}, standard deviation {std:.1f}, min {low:.0f}, max {high:.0f}")
    best = max(games, key=lambda game: game.score)
    say(f"filming {kind} {best.seed - args.seed + 1}; everything else is in {run_dir}")
    film(best, run_dir / "film.mp4", zoom=3)
    if args.gif:  # a palette for each frame, as one for all would need all frames in memory
        gif = ["-f", "gif", "-vf", "split[a],palettegen=stats_mode=single,[a]paletteuse=new=1"]
        film(best, run_dir / "film.gif", zoom=1, codec="gif", pixelformat="pal8", output_params=gif)
    say(f"{run_dir / 'film.mp4'}")
    if interrupted:
        raise KeyboardInterrupt
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)  # a few frames are too little work for several threads
    cv2.setNumThreads(1)
    if hasattr(sys.stdout, "reconfigure") and not hasattr(sys, "ps1"):  # not at a prompt
        sys.stdout.reconfigure(errors="backslashreplace")  # prints a folder of any name
    first = {}  # when the first signal to stop came

    def stop(*_):
        now = time.monotonic()
        if not 0 < now - first.setdefault("time", now) < 1:  # `timeout` and others send two at once
            raise KeyboardInterrupt

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored
            signal.signal(number, stop)
    try:  # in a notebook, argv is the kernel's
        play(tyro.cli(Args, args=[] if sys.argv[0].endswith("kernel_launcher.py") else None))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
