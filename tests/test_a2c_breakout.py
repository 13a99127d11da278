"""a2c_breakout.py: the wrappers, the arithmetic, the workers and a whole run; the game is real."""

import copy
import io
import json
import multiprocessing
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from launch import Process, gone
from short_runs import curves
from torch.utils.tensorboard import SummaryWriter

import a2c_breakout as a2c
import play_breakout

SCRIPT = Path(a2c.__file__)
SOURCE = SCRIPT.read_text(encoding="utf-8")
BREAKOUT, PONG, QBERT = (f"{game}NoFrameskip-v4" for game in ("Breakout", "Pong", "Qbert"))
slow = pytest.mark.slow


def train(folder: Path, **changes) -> dict:
    """Trains in this process, 4 updates, and returns the final weights."""
    flags = {"num_envs": 1, "num_steps": 5, "total_timesteps": 20, "resume": folder} | changes
    a2c.train(a2c.Args(**flags))
    return load(folder / "weight_end.pth")


def at(update: int, statement: str, step: int = 4) -> str:
    """The program, in which something happens before a step of an update."""
    step = re.search(rf"^( +)# {step}\. .*\n", SOURCE, re.M)
    lines = f"{step[1]}if update == {update}:\n{step[1]}    {statement}\n"
    return SOURCE[: step.end()] + lines + SOURCE[step.end() :]


def one_line(process: Process) -> str:
    """All that a run says on stderr which ends with an error."""
    assert process.wait() == 1, process.stderr
    [line] = process.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def saved(content) -> io.BytesIO:
    torch.save(content, file := io.BytesIO())
    file.seek(0)
    return file


# ---- the game ----


@pytest.mark.parametrize("env_id", [BREAKOUT, PONG, QBERT])
def test_screens_are_those_of_gymnasium(env_id):
    """Bit for bit, with the same 1 to 30 no-ops; over the end of a game, but for Pong's."""
    ours = a2c.Warp(a2c.MaxAndSkip(a2c.NoopReset(gym.make(env_id, obs_type="ram"))))
    theirs = gym.wrappers.AtariPreprocessing(gym.make(env_id, obs_type="grayscale"), noop_max=30)
    rng = np.random.default_rng(0)
    for seed in (3, *[None] * 9):
        assert np.array_equal(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0])
    for _ in range(400):
        action = int(rng.integers(ours.action_space.n))
        mine, other = ours.step(action), theirs.step(action)
        assert np.array_equal(mine[0], other[0]) and mine[1:4] == other[1:4]
        if mine[2]:
            assert np.array_equal(ours.reset()[0], theirs.reset()[0])


@pytest.mark.parametrize(("env_id", "frames"), [(BREAKOUT, 65_536), (PONG, 108_000)])
def test_the_emulator_gets_the_length_of_a_game(env_id, frames):
    """From frame 65,536 on, Breakout's cartridge serves no ball any more."""
    for make_env in (a2c.make_env, play_breakout.make_env):  # the second value is 0 or False
        emulator = make_env(env_id, 0).unwrapped.ale
        assert emulator.getInt("max_num_frames_per_episode") == frames
        assert emulator.getFloat("repeat_action_probability") == 0


@pytest.mark.parametrize("chance", [0.0, 0.25])
def test_sticky_actions_go_on_in_each_frame_by_chance(chance, monkeypatch):
    """k frames after a decision the action before it is still there by chance^k."""
    env, frames = a2c.make_env(PONG, 0, chance), []
    step = env.unwrapped.step
    monkeypatch.setattr(env.unwrapped, "step", lambda action: frames.append(action) or step(action))
    env.reset(seed=3)
    frames.clear()
    for decision in range(600):  # a game of Pong takes longer
        env.step(decision % 2 + 2)
    wrong = np.array(frames).reshape(600, 4)[1:] != np.arange(1, 600)[:, None] % 2 + 2
    assert np.allclose(wrong.mean(axis=0), chance ** np.arange(1, 5), atol=0.05)


@pytest.mark.parametrize(("env_id", "chance"), [(QBERT, 0.0), (BREAKOUT, 0.25), (PONG, 0.9)])
def test_a_restored_environment_goes_on_as_the_other_one(env_id, chance):
    """The emulator's own sticky actions did not: it does not save which action goes on."""
    first, second = (a2c.make_env(env_id, 0, chance) for _ in range(2))
    first.reset(seed=3)
    rng = np.random.default_rng(0)
    for number in range(8):
        second.reset(seed=number)
        state = a2c.get_state(first)
        a2c.set_state(second, torch.load(saved(state), weights_only=True))
        for action in rng.integers(6, size=40) % first.action_space.n:
            mine, other = first.step(action), second.step(action)
            assert np.array_equal(mine[0], other[0]) and mine[1:] == other[1:]
            if mine[2] or mine[3]:
                assert np.array_equal(first.reset()[0], second.reset()[0])
        assert a2c.get_state(first) == a2c.get_state(second)


class Steps(gym.Env):
    """A game that plays (reward, lives left) and, where it ends, "over" or "cut"."""

    def __init__(self, *steps):
        self.steps, self.ale, self.left = list(steps), self, 3

    def reset(self, **kwargs):
        self.left = 3
        return None, {}

    def lives(self):
        return self.left

    def step(self, action):
        reward, self.left, *end = self.steps.pop(0)
        return None, reward, "over" in end, "cut" in end, {}


ON, LIFE = (False, False, None), (True, False, None)


@pytest.mark.parametrize(
    ("steps", "idle", "expected"),
    [  # the no-op behind a lost life earns 4, or ends the game; a cut is an end; 0 lives are none
        ([(1, 3), (2, 2), (4, 2), (8, 0, "over")], 0, [ON, LIFE, (True, False, (15, 4))]),
        ([(1, 2), (2, 0, "over"), (5, 3)], 0, [(True, False, (3, 2)), ON]),
        ([(1, 3, "cut"), (1, 3)], 0, [(False, True, (1, 1)), ON]),
        ([(0, 1), (0, 1), (0, 0), (0, 0, "over")], 0, [LIFE, ON, (True, False, (0, 4))]),
        # idle steps are counted over the loss of a life, also the no-op; a reward begins anew
        ([(0, 3), (0, 2), (0, 2), (0, 3)], 3, [ON, (True, False, (0, 3)), ON]),
        ([(0, 3), (0, 3), (1, 3), (0, 3), (0, 3), (0, 3)], 3, [ON] * 5 + [(False, True, (1, 6))]),
        ([(0, 3)] * 9, 0, [ON] * 9),
    ],
)
def test_a_lost_life_ends_the_episode_but_not_the_game(steps, idle, expected):
    """What the decisions show: terminated, truncated, score and length of a game that has ended."""
    game = Steps(*steps)
    env, seen = a2c.EpisodicLife(game, idle), []
    env.reset()
    while game.steps:
        _, _, terminated, truncated, info = env.step(0)
        info |= env.reset()[1] if terminated or truncated else {}
        seen.append((terminated, truncated, info.get("game")))
    assert seen == expected


# ---- the network ----


def test_initialisation_is_the_books_and_its_weights_load():
    network = a2c.ActorCritic(4)
    shapes = {"conv.0": (32, 4, 8, 8), "conv.2": (64, 32, 4, 4), "conv.4": (64, 64, 3, 3),
              "conv.7": (512, 3136), "critic": (1, 512), "actor": (4, 512)}  # fmt: skip
    for name, shape in shapes.items():
        weight = network.get_parameter(f"{name}.weight").flatten(1)
        gain = {"critic": 1, "actor": 0.01}.get(name, 2**0.5)
        assert torch.allclose(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-5)
        assert not network.get_parameter(f"{name}.bias").any()
    book = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    book |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    network.load_state_dict(book, strict=True)
    assert torch.equal(network.actor.bias, book["actor.bias"])


# ---- the workers ----


def test_workers_fill_the_rollout_with_transitions_of_the_game():
    """Each environment played again here, alone: same draws, and no reset step is a transition."""
    T, N = 50, 3
    args = a2c.Args(seed=15, num_envs=N, num_steps=T, max_idle_steps=40, sticky_actions=0.25)
    storage = a2c.RolloutStorage(T, N)
    torch.manual_seed(0)
    network, seen, games = a2c.ActorCritic(4).share_memory(), [], []
    network.actor.bias.data[:] = torch.tensor([0.1, 0.2, 0.4, 0.3]).log()
    torch.set_num_threads(2)
    workers = a2c.start_workers(args, network, storage, [])
    torch.set_num_threads(1)
    pids = [process.pid for process in multiprocessing.active_children()]
    for update in range(2):
        for pipe in workers:
            pipe.send(update)
        games += sum((pipe.recv()[0] for pipe in workers), [])
        seen.append([array.clone() for array in vars(storage).values()])
    for pipe in workers:
        pipe.close()
    assert gone(pids) and len(pids) == 2
    _, actions, rewards, masks = (torch.cat(parts) for parts in zip(*seen))
    expected_games, ends, probabilities = [], set(), 0
    seeds = np.random.SeedSequence(15).generate_state(N)
    for i in range(N):
        env = a2c.make_env(BREAKOUT, max_idle_steps=40, sticky_actions=0.25)
        frames, _ = env.reset(seed=int(seeds[i]))
        for t in range(2 * T):
            assert np.array_equal(seen[t // T][0][t % T, i], frames)
            with torch.no_grad():
                logits = network(torch.from_numpy(frames)[None])[1][0]
            probabilities += logits.softmax(-1)
            noise = env.unwrapped.np_random.gumbel(size=4)
            assert actions[t, i] == (logits.numpy() + noise).argmax()
            frames, reward, terminated, truncated, info = env.step(actions[t, i].item())
            assert rewards[t, i] == reward and masks[t, i] == (not (terminated or truncated))
            ends.update([(terminated, truncated)])
            if terminated or truncated:
                frames, reset_info = env.reset()
                info |= reset_info
            if "game" in info:
                expected_games.append((t * N + i + 1, *info["game"]))
            assert t % T < T - 1 or np.array_equal(seen[t // T][0][T, i], frames)
    assert ends == {(False, False), (True, False), (False, True)}  # lives and cuts
    assert rewards.any() and sorted(games) == sorted(expected_games) != []
    drawn = actions.flatten().bincount()  # with the policy's probabilities: chi-square, p = 0.001
    assert ((drawn - probabilities) ** 2 / probabilities).sum() < 16.3


# ---- a run ----


def test_curves_and_result_tell_of_the_same_games(finished):
    run_dir, _ = finished("a2c_breakout")
    result, shown = json.loads((run_dir / "result.json").read_text()), curves(run_dir)
    rate = load(run_dir / "checkpoint.pth")["optimizer"]["param_groups"][0]["lr"]
    assert shown["charts/learning_rate"] == [(200, pytest.approx(rate))]
    assert rate == pytest.approx(7e-4 * 0.01)
    torch.manual_seed(3)
    weights = load(run_dir / "weight_0.pth")
    assert all(torch.equal(x, weights[name]) for name, x in a2c.ActorCritic(4).state_dict().items())
    assert shown["charts/SPS"] == [(200, pytest.approx(result["steps_per_second"]))]
    steps, returns = zip(*shown["charts/episodic_return"])
    same_steps, lengths = zip(*shown["charts/episodic_length"])
    assert len(returns) == result["games"] > 9 and min(lengths) >= 15
    assert result["mean_return"] == pytest.approx(np.mean(returns))
    assert list(steps) == sorted(set(steps)) and 0 < steps[0] and steps[-1] <= 200
    assert same_steps == steps


def test_each_loss_is_logged_under_its_own_name(tmp_path, monkeypatch, capsys):
    """That of every hundredth update, with a line of output."""
    losses, compute = [], a2c.compute_losses
    spied = lambda *batch: losses.append(compute(*batch)) or losses[-1]  # noqa: E731
    monkeypatch.setattr(a2c, "compute_losses", spied)
    train(tmp_path, num_steps=1, total_timesteps=210)
    assert capsys.readouterr().out.count("\nfinished timesteps") == 3
    for name, loss, other in zip(("value_loss", "policy_loss", "entropy"), losses[99], losses[199]):
        expected = [(100, pytest.approx(loss.item())), (200, pytest.approx(other.item()))]
        assert curves(tmp_path)[f"losses/{name}"] == expected


def test_the_line_of_output(capsys, tmp_path):
    args, writer = a2c.Args(total_timesteps=3_700_000), SummaryWriter(tmp_path)
    progress = {"timesteps": 100_000, "seconds": 100, "games": 0, "last_scores": [], "to_log": []}
    a2c.log(args, writer, progress, {}, 0)
    progress["to_log"] = [(number, number, 5) for number in range(150)]  # timestep, score, length
    a2c.log(args, writer, progress, {}, 0)
    end = "1000 steps/s, 1.0 h left\n"
    assert capsys.readouterr().out == (
        f"finished timesteps 100000, no game is over yet, {end}"
        f"finished timesteps 100000, last 100 games: mean/median 99.5/99.5, min/max 50/149, {end}"
    )


def test_the_last_line_of_output_is_a_command_that_plays_the_game(tmp_path, capsys):
    train(tmp_path / "a folder", env_id=PONG)
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("Watch: python "))
    args = tyro.cli(play_breakout.Args, args=command[1:])
    play_breakout.load_network(args.weights, play_breakout.make_env(args.env_id, True))


def test_on_a_gpu_the_workers_get_every_update(tmp_path, pretend_a_gpu, monkeypatch):
    """By the same lines; but what is sent to the GPU here stays where it is."""
    weights = train(tmp_path / "cpu", average_decay=0)
    pretend_a_gpu(a2c)
    for kind in (torch.Tensor, torch.nn.Module):

        def to(self, *place, to=kind.to, **layout):
            return to(self, *("cpu" if x == "cuda:0" else x for x in place), **layout)

        monkeypatch.setattr(kind, "to", to)
    others = train(tmp_path / "gpu", average_decay=0, device="cuda")
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())


@pytest.mark.parametrize(("clip_rewards", "max_grad_norm"), [(True, 1e-2), (False, 1e3)])
def test_an_update_is_rmsprops_step_with_the_clipped_gradient_of_the_whole_loss(
    tmp_path, monkeypatch, clip_rewards, max_grad_norm
):
    """Recomputed here in float64, in a game in which a move to the right costs 7 points."""
    step, storage, gamma = a2c.MaxAndSkip.step, a2c.RolloutStorage(40, 1), 0.9

    def expensive_step(env, action):
        frames, _, *rest = step(env, action)
        return frames, -7.0 if action == 2 else 0.0, *rest

    monkeypatch.setattr(a2c.MaxAndSkip, "step", expensive_step)  # forked workers have it too
    monkeypatch.setattr(a2c, "RolloutStorage", lambda *sizes: storage if sizes == (40, 1) else None)
    train(tmp_path, num_steps=40, total_timesteps=40, gamma=gamma, max_idle_steps=5,
          value_loss_coef=0.5, entropy_coef=0.02, max_grad_norm=max_grad_norm, rmsprop_eps=1e-3,
          clip_rewards=clip_rewards)  # fmt: skip
    assert storage.rewards.unique().tolist() == [-7, 0]

    network = a2c.ActorCritic(4).double()
    network.load_state_dict(load(tmp_path / "weight_0.pth"))
    features = network.conv(storage.observations[:, 0].double() / 255)  # (41, 512)
    values, log_probs = network.critic(features)[:, 0], network.actor(features[:-1]).log_softmax(-1)
    rewards = storage.rewards.sign() if clip_rewards else storage.rewards
    returns = a2c.compute_returns(rewards, storage.masks, values[-1:].detach().float(), gamma)
    advantages = returns[:, 0] - values[:-1]
    loss = 0.5 * (advantages**2).mean() + 0.02 * (log_probs.exp() * log_probs).sum(-1).mean()
    loss -= (advantages.detach() * log_probs[range(40), storage.actions[:, 0]]).mean()
    loss.backward()
    norm = torch.stack([weight.grad.norm() for weight in network.parameters()]).norm()
    checkpoint = load(tmp_path / "checkpoint.pth")
    for name, weight in network.named_parameters():
        gradient = weight.grad * min(1, max_grad_norm / norm)
        expected = weight - 7e-4 * gradient / ((0.01 * gradient**2).sqrt() + 1e-3)
        assert torch.allclose(checkpoint["network"][name].double(), expected, atol=1e-6)
    scores, lengths = (curves(tmp_path)[f"charts/episodic_{x}"] for x in ("return", "length"))
    assert min(scores)[1] < 0 and all(score % 7 == 0 for _, score in scores)  # not their signs
    assert min(length for _, length in lengths) == 5


@pytest.mark.parametrize("average_decay", [0.1, 0.0])
def test_every_tenth_update_is_averaged_and_the_average_follows_faster_at_first(
    tmp_path, monkeypatch, average_decay
):
    save, networks = a2c.save, []

    def spied_save(path, content):
        if path.name == "checkpoint.pth":
            networks.append(copy.deepcopy(content["network"].state_dict()))
        save(path, content)

    monkeypatch.setattr(a2c, "save", spied_save)
    updates = 22 if average_decay else 2
    flags = {"num_steps": 1, "total_timesteps": updates, "checkpoint_every": 1}
    kept = train(tmp_path, average_decay=average_decay, **flags)
    for name, weight in kept.items():
        mean = networks[0][name]
        for update, decay in [(10, 10 / 110), (20, 0.1)] if average_decay else [(1, 0)]:
            mean = decay * mean + (1 - decay) * networks[update][name]
        assert torch.allclose(weight, mean, atol=1e-7)


# ---- what is given and what is refused ----


def test_idle_games_end_in_breakout_only_unless_one_says_so():
    assert a2c.Args().max_idle_steps == 400 and a2c.Args(env_id=PONG).max_idle_steps == 0
    assert a2c.Args(max_idle_steps=0).max_idle_steps == 0
    assert a2c.Args(env_id=PONG, max_idle_steps=9).max_idle_steps == 9


@pytest.mark.parametrize(
    ("flags", "message"),
    [*[({"num_envs": n, "total_timesteps": 10 * n}, "--num-envs.*not enough shared memory")
       for n in (10**9, 10**19)],
     *[({"env_id": name}, "--env-id.*not a game of")
       for name in ("NoSuchNoFrameskip-v4", "CartPole-v1", "ALE/Breakout-v5", "")]],
)  # fmt: skip
def test_what_the_machine_or_ale_py_cannot_do_is_refused_and_leaves_nothing(
    tmp_path, flags, message
):
    with pytest.raises(ValueError, match=rf"\A{message}.*\Z"):
        a2c.train(a2c.Args(runs_dir=tmp_path / "runs", **flags))
    assert not (tmp_path / "runs").exists()


def test_a_rank_without_a_number_of_ranks_is_none(tmp_path):
    """A batch system may set it."""
    flags, env = ["--num-envs", 1, "--total-timesteps", 5], {"RANK": "1", "WORLD_SIZE": ""}
    assert Process(SCRIPT, *flags, "--resume", tmp_path, env=env).wait() == 0
    assert (tmp_path / "result.json").exists()


def test_threads_that_openmp_is_told_to_bind_do_not_keep_the_workers_on_one_core():
    code = """import os; before = os.sched_getaffinity(0)
import a2c_breakout; assert os.sched_getaffinity(0) == before"""
    bind = os.environ | {"OMP_PROC_BIND": "true", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, env=bind, check=True)


def test_the_lock_goes_with_a_failed_run_though_its_traceback_stays(tmp_path):
    """As a notebook keeps the last one."""
    with pytest.raises(ValueError, match="gradient not finite") as _traceback:
        train(tmp_path, learning_rate=1e29)
    code = "import os, sys; os.lockf(os.open(sys.argv[1], os.O_WRONLY), os.F_TLOCK, 0)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "lock"], check=True)


def test_without_locks_as_on_windows_a_run_begins_all_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr(a2c.os, "lockf")
    assert train(tmp_path)


def test_too_little_shared_memory_for_the_network_is_one_line(tmp_path):
    """Its largest matrix has 6 MB; the storage of one environment has less."""
    process = Process(SCRIPT, "--num-envs", 1, cwd=tmp_path, limits={resource.RLIMIT_FSIZE: 10**6})
    assert "not enough shared memory" in one_line(process)
