"""`qvq-serve --demo --tp 2`: two real workers on the CPU, the same greedy tokens as one."""

from pathlib import Path

import psutil

from qvq_serve.demo.cases import case
from tests.engine.conftest import Server, data_url, serving, user


def greedy_tokens(server: Server, seed: int) -> list[int]:
    one = case(seed, "invoice", size=(476, 532))
    message = user({"url": data_url(one.image)}, one.question)
    answer = server.chat(message, max_tokens=48, ignore_eos=True, return_token_ids=True)
    return answer.json()["choices"][0]["token_ids"]


def workers_of(server: Server) -> int:
    """Processes below the server that are vLLM's workers."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    return sum("VLLM::Worker" in " ".join(process.cmdline()) for process in below)


def test_two_workers_answer_as_one_does(server: Server, cache: Path) -> None:
    alone = [greedy_tokens(server, seed) for seed in (1, 2, 3)]
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert min(len(set(tokens)) for tokens in alone) > 12
    with serving(cache, "--demo", "--tp", "2", "--governor", "on") as two:
        assert workers_of(two) == 2
        assert [greedy_tokens(two, seed) for seed in (1, 2, 3)] == alone
        looped = two.chat(user("How much?"), max_tokens=400, logit_bias={"66": 100}).json()["qvq"]
        assert looped["ended"] == "looped" and looped["governor"] == {"found": "loop", "period": 1}
