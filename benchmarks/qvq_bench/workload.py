"""What is asked: a TOML file of settings, and each request as a function of the seed and its index alone.

A request therefore does not depend on when, where or in what order the others are made. SCHEMA has every key with its
default; what a file says beyond it, or wrongly, is a UsageError.
"""

import base64
import hashlib
import json
import math
import random
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qvq_bench.images import KINDS, draw, encode
from qvq_serve.errors import UsageError, nearest

FORMAT = 1
"""Part of the hash: raised when the same settings come to give other requests."""
MOST_TOKENS = 1_000_000
IMAGE_TYPES = {".jpeg": "image/jpeg", ".jpg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
QUESTION_TOKENS = 13
"""Of the questions below, on the average; they have 8 to 18."""
# Words that are one token each in Qwen's vocabulary, after a space (zh and ja: after a word); a question about images;
# one about the words alone.
LANGUAGES: dict[str, tuple[str, str, str]] = {
    "en": ("time people water light house world number system market family letter music story night morning river",
           "What does this image show, and what follows from it?", "What do most of these words have in common?"),
    "zh": ("时间 人们 城市 世界 家庭 历史 工作 朋友 学校 道路 音乐 故事 夏天 花园 颜色 语言",
           "这张图片里有什么？能得出什么结论？", "这些词大多有什么共同点？"),
    "es": ("tiempo gente agua casa mundo sistema familia ciudad historia noche luz mesa libro calle trabajo camino",
           "¿Qué muestra esta imagen y qué se deduce de ella?", "¿Qué tienen en común la mayoría de estas palabras?"),
    "fr": ("temps gens maison monde ville famille histoire nuit table livre rue travail ami chemin personne groupe",
           "Que montre cette image, et que peut-on en conclure ?", "Qu'ont en commun la plupart de ces mots ?"),
    "de": ("Zeit Haus Welt Stadt Familie Geschichte Nacht Licht Buch Arbeit Freund Weg Person Form Teil Hand",
           "Was zeigt dieses Bild, und was folgt daraus?", "Was haben die meisten dieser Wörter gemeinsam?"),
    "ja": ("時間 世界 人々 都市 家族 学校 道路 科学 未来 市場 数字 今日 日本 問題 情報 方法",
           "この画像には何がありますか。そこから何が分かりますか。", "これらの言葉の多くに共通する点は何ですか。"),
    "ru": ("время люди дом мир город история ночь свет стол работа друг группа форма часть жизнь имя",
           "Что показано на этом изображении и что из этого следует?", "Что общего у большинства этих слов?"),
    "ko": ("사람 시간 문제 우리 생각 경우 그리고 하지만 많은 다른 모든 함께 사용 지금 정말 같은",
           "이 이미지는 무엇을 보여 주며, 무엇을 알 수 있습니까?", "이 단어들의 공통점은 무엇입니까?"),
    "ar": ("وقت عمل يوم سنة مكان هذا هذه التي الذي كان بين كل على مدينة كتاب تاريخ",
           "ماذا تظهر هذه الصورة، وماذا نستنتج منها؟", "ما الذي تشترك فيه معظم هذه الكلمات؟"),
}  # fmt: skip


def filler(rng: random.Random, language: str, tokens: int) -> str:
    """Common words in a random order, about so many tokens."""
    words = rng.choices(LANGUAGES[language][0].split(), k=tokens)
    return ("" if language in ("zh", "ja") else " ").join(words)


@dataclass(frozen=True)
class Distribution:
    """Whole numbers: `values` by their weights, else lognormal where there is a median, else uniform."""

    low: int = 0
    high: int = 0
    median: int = 0
    p95: int = 0
    values: tuple[int, ...] = ()
    weights: tuple[float, ...] | None = None

    def draw(self, rng: random.Random) -> int:
        """One of them; a lognormal one is cut off at `high`, and is at least 1."""
        if self.values:
            return rng.choices(self.values, self.weights)[0]
        if self.median:
            sigma = math.log(self.p95 / self.median) / 1.6449
            return max(1, round(min(self.high, rng.lognormvariate(math.log(self.median), sigma))))
        return rng.randint(self.low, self.high)

    def draw_running(self, rng: random.Random) -> int:
        """One as they are met among answers that run: one of twice the length is met twice as often."""
        while rng.random() * self.most >= (drawn := self.draw(rng)):
            pass
        return drawn

    @property
    def most(self) -> int:
        """The greatest that can be drawn."""
        return max(self.values) if self.values else self.high


Check = Callable[[Any], Any]
"""From a TOML value its checked form; raises ValueError with what would do. These, and makers of them, follow."""
SHAPES = ({"low", "high"}, {"median", "p95", "max"}, {"values"}, {"values", "weights"})


def number(least: float, most: float, kind: type = float) -> Check:
    def check(value: Any) -> Any:
        right = isinstance(value, int | kind) and not isinstance(value, bool)
        if not right or not least <= value <= most:
            raise ValueError(f"it must be a{' whole' if kind is int else ''} number from {least} to {most}")
        return value

    return check


def whole(least: int, most: int) -> Check:
    return number(least, most, int)


share = number(0, 1)


def one_of(kind: type, need: str, *known: str) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, kind) or (known and value not in known):
            near = nearest(str(value), known)
            raise ValueError(f"it must be {need}{', '.join(known)}{near and '.' + near}")
        return value

    return check


def several(each: Check, need: str) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError(f"it must be {need}")
        return tuple(each(item) for item in value)

    return check


def weights(value: Any) -> tuple[float, ...]:
    checked: tuple[float, ...] = several(number(0, MOST_TOKENS), "a list of weights")(value)
    if not sum(checked):
        raise ValueError("one of its weights must be above 0")
    return checked


def size(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("it must be a list of [width, height], for example [[980, 980]]")
    return tuple(whole(56, 4096)(side) for side in value)


def languages(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or not value:
        raise ValueError("it must be a table of weights, for example {en = 0.7, zh = 0.3}")
    known_keys(value, LANGUAGES)
    return dict(sorted(zip(value, weights(list(value.values())), strict=True)))  # an order that the hash can ignore


def distribution(least: int, most: int) -> Check:
    def check(value: Any) -> Distribution:
        shape = dict(value) if isinstance(value, dict) else {"low": value, "high": value}
        known_keys(shape, set().union(*SHAPES))
        if set(shape) not in SHAPES:
            raise ValueError("it must be a number, {low, high}, {median, p95, max} or {values, weights}")
        if "values" in shape:
            values = several(whole(least, most), "values = a list of numbers")(shape["values"])
            given = weights(shape["weights"]) if "weights" in shape else None
            if given and len(given) != len(values):
                raise ValueError(f"it has {len(values)} values and {len(given)} weights, and must have as many of both")
            return Distribution(values=values, weights=given)
        for each in shape.values():
            whole(least, most)(each)
        if "median" in shape:
            if not 1 <= shape["median"] < shape["p95"] <= shape["max"]:
                raise ValueError("it must have 1 <= median < p95 <= max")
            return Distribution(median=shape["median"], p95=shape["p95"], high=shape["max"])
        if shape["low"] > shape["high"]:
            raise ValueError("its low must not be above its high")
        return Distribution(**shape)

    return check


def known_keys(given: Iterable[str], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"unknown key '{key}'.{nearest(key, known)} Known: {', '.join(sorted(known))}")


ARRIVALS: dict[str, tuple[str, ...]] = {
    "closed": ("think",), "constant": (), "poisson": (), "bursts": ("burst",), "ramp": ("ramp_from", "ramp_seconds"),
    "trace": ("trace",),
}  # fmt: skip
"""The kinds of arrivals, each with the keys that are its own."""
TEXT = one_of(str, "text")
SCHEMA: dict[str, dict[str, tuple[Any, Check]]] = {
    "images": {
        "count": (Distribution(1, 1), distribution(0, 100)),
        "kinds": (KINDS, several(one_of(str, "a list of: ", *KINDS), "a list of: " + ", ".join(KINDS))),
        "sizes": (((980, 980),), several(size, "a list of [width, height], for example [[980, 980]]")),
        "weights": (None, weights),
        "repeated": (0.0, share),
        "folder": (None, TEXT),
    },
    "text": {
        "tokens": (Distribution(256, 256), distribution(1, MOST_TOKENS)),
        "languages": ({"en": 1}, languages),
        "shared_prefix_tokens": (0, whole(0, MOST_TOKENS)),
        "shared_prefix": (0.0, share),
    },
    "output": {
        "tokens": (Distribution(512, 512), distribution(1, MOST_TOKENS)),
        "ignore_eos": (True, one_of(bool, "true or false")),
    },
    "sampling": {
        "temperature": (None, number(0, 2)),
        "top_p": (None, number(1e-6, 1)),
        "top_k": (None, whole(-1, MOST_TOKENS)),
        "repetition_penalty": (None, number(1e-6, 2)),
        "seed": (None, whole(-(2**63), 2**63 - 1)),
        "thinking_token_budget": (None, whole(0, MOST_TOKENS)),
    },
    "arrivals": {
        "kind": ("closed", one_of(str, "one of: ", *ARRIVALS)),
        "think": (0.0, number(0, 86_400)),
        "burst": (8, whole(1, 100_000)),
        "ramp_from": (0.1, number(0, 100_000)),
        "ramp_seconds": (60, number(0.001, 86_400)),
        "trace": (None, TEXT),
    },
    "own": {"requests": (None, TEXT)},
}


@dataclass(frozen=True)
class Request:
    """One chat completion request: its body has neither `model` nor `stream`."""

    index: int
    body: dict[str, Any]
    images: int  # that it carries
    language: str  # of the question; "" for a request of one's own
    repeated: bool  # its images were sent before (own ones: may have been, once all files were in turn)
    share: float = 1.0  # of its answer that is left to be written; the rest is in its prompt


@dataclass(frozen=True)
class Workload:
    """A checked workload: the sections of its file with their defaults, and what its other files hold."""

    name: str
    about: str
    seed: int
    images: dict[str, Any] = field(repr=False)
    text: dict[str, Any] = field(repr=False)
    output: dict[str, Any] = field(repr=False)
    sampling: dict[str, Any] = field(repr=False)  # what is set only
    arrivals: dict[str, Any] = field(repr=False)
    """`kind`, the settings of all kinds, and `trace_at`: a trace's times of arrival, in seconds."""
    own: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """Request bodies of one's own."""
    files: dict[str, str] = field(default_factory=dict, repr=False)
    """Images of one's own: path -> sha256."""

    @property
    def hash(self) -> str:
        """16 hex digits that change with all that requests and arrivals depend on: not name, about and paths."""
        settings = asdict(self) | {"format": FORMAT, "files": list(self.files.values())}
        del settings["name"], settings["about"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def settings(self) -> dict[str, Any]:
        """All of it for a result's JSON; of what other files hold, how much there is."""
        arrivals = self.arrivals | {"trace_at": len(self.trace_at)}
        return asdict(self) | {"arrivals": arrivals, "own": len(self.own), "files": len(self.files)}

    @property
    def trace_at(self) -> tuple[float, ...]:
        """Seconds at which a trace's requests arrive; none for other kinds of arrivals."""
        times: tuple[float, ...] = self.arrivals["trace_at"]
        return times

    @property
    def ignores_eos(self) -> bool:
        """Whether each answer has exactly the length that was asked for."""
        return all(body.get("ignore_eos", False) for body in self.own) if self.own else bool(self.output["ignore_eos"])

    def request(self, index: int, share: float = 1.0) -> Request:
        """The request of this index, from 0: the same whenever it is asked for.

        With a share below 1 it is met in the middle of its answer, where the workload sets each length: that share is
        left to be written, and as much text as was written is in the prompt (not with requests of one's own).
        """
        share = share if self.ignores_eos else 1.0
        if self.own:
            body = self.sampling | self.own[index % len(self.own)]
            share = share if "max_tokens" in body and "min_tokens" not in body else 1.0
            if share < 1:
                body |= {"max_tokens": max(math.ceil(body["max_tokens"] * share), 1)}
            contents = [message["content"] for message in body["messages"] if isinstance(message.get("content"), list)]
            count = sum(isinstance(part, dict) and "image_url" in part for content in contents for part in content)
            return Request(index, body, count, "", count > 0 and index >= len(self.own), share)
        source = self._source(index)
        urls, again = self._urls(source)
        rng = self._random("request", index)
        language = rng.choices(list(self.text["languages"]), list(self.text["languages"].values()))[0]
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        text, lengths = self._text(rng, language, bool(urls)), self.output["tokens"]
        tokens = lengths.draw_running(rng) if share < 1 else lengths.draw(rng)
        left = math.ceil(tokens * share)
        if left < tokens:
            text += "\n\n" + filler(rng, language, tokens - left)
        content.append({"type": "text", "text": text})
        body = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": left,
            **({"ignore_eos": True} if self.output["ignore_eos"] else {}),
            **self.sampling,
        }
        return Request(index, body, len(urls), language, bool(urls) and (again or source != index), share)

    def _random(self, purpose: str, index: int = 0) -> random.Random:
        return random.Random(f"{self.seed} {purpose} {index}")

    def _repeats(self, index: int) -> bool:
        return index > 0 and self._random("repeats", index).random() < self.images["repeated"]

    def _source(self, index: int) -> int:
        """The request whose images this one has: itself, or an earlier one that repeats none, each as likely."""
        if not self._repeats(index):
            return index
        rng = self._random("source", index)
        earlier = (rng.randrange(index) for _ in range(1000))  # where next to all repeat, 0 may be hard to find
        return next((at for at in earlier if not self._repeats(at)), 0)

    def _urls(self, index: int) -> tuple[list[str], bool]:
        """The images of a request that repeats none, and whether files of one's own have come round again."""
        rng, images, urls = self._random("images", index), self.images, []
        count = images["count"].draw(rng)
        first, paths = index * images["count"].most, list(self.files)
        for at in range(count):
            if paths:
                path = paths[(first + at) % len(paths)]
                mime, data = IMAGE_TYPES[Path(path).suffix.lower()], Path(path).read_bytes()
            else:
                kind, (width, height) = rng.choice(images["kinds"]), rng.choices(images["sizes"], images["weights"])[0]
                mime, data = encode(draw(kind, width, height, rng.getrandbits(63)), kind)
            urls.append(f"data:{mime};base64,{base64.b64encode(data).decode()}")
        return urls, bool(paths) and first + count > len(paths)

    def _text(self, rng: random.Random, language: str, with_images: bool) -> str:
        """For their share the shared beginning, then words in an order of its own, then the question."""
        tokens, prefix = self.text["tokens"].draw(rng), ""
        if rng.random() < self.text["shared_prefix"]:
            prefix = filler(self._random("prefix"), "en", self.text["shared_prefix_tokens"] - 1) + "\n\n"
        if tokens < QUESTION_TOKENS + 4:  # too short for a question and for words that differ
            return prefix + filler(rng, language, tokens)
        question = LANGUAGES[language][1 if with_images else 2]
        return f"{prefix}{filler(rng, language, tokens - QUESTION_TOKENS)}\n\n{question}"


def known_workloads() -> dict[str, Path]:
    """The workloads that travel with the package, by name."""
    installed = Path(__file__).parent / "workloads"  # where the wheel puts them; a checkout has one source of them
    directory = installed if installed.is_dir() else Path(__file__).parents[1] / "workloads"
    return {path.stem: path for path in sorted(directory.glob("*.toml"))}


def load_workload(name_or_path: str, seed: int | None = None, arrivals: str | None = None) -> Workload:
    """A workload by its name, or by the path of its TOML file; a seed and a kind of arrivals replace the file's.

    Raises UsageError for what cannot be.
    """
    path = Path(name_or_path)
    if "/" not in name_or_path and path.suffix != ".toml":
        known = known_workloads()
        if name_or_path not in known:
            near = nearest(name_or_path, known)
            raise UsageError(
                f"unknown workload '{name_or_path}'.{near} Known: {', '.join(known)}; or give the path of a TOML file."
            )
        path = known[name_or_path]
    try:
        workload = read(path, tomllib.loads(text_of(path)))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}.") from None
    if arrivals is not None and arrivals not in ARRIVALS:
        raise UsageError(f"unknown arrivals '{arrivals}'.{nearest(arrivals, ARRIVALS)} Known: {', '.join(ARRIVALS)}.")
    if arrivals == "trace" and not workload.trace_at:
        raise UsageError(
            f"arrivals 'trace': {path} has none; set kind = 'trace' and trace = 'file.jsonl' in [arrivals]."
        )
    kind = workload.arrivals["kind"] if arrivals is None else arrivals
    return replace(workload, seed=workload.seed if seed is None else seed, arrivals=workload.arrivals | {"kind": kind})


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', 'it is not UTF-8 text')}.") from None


def read(path: Path, table: dict[str, Any]) -> Workload:
    """A file's table, checked against SCHEMA, and against what its settings say about each other."""

    def wrong(where: str, value: Any, need: object) -> UsageError:
        return UsageError(f"{path}: {where} is {value!r}; {need}{'' if str(need).endswith('?') else '.'}")

    def checked(where: str, value: Any, check: Check) -> Any:
        try:
            return check(value)
        except ValueError as error:
            raise wrong(where, value, error) from None

    def keys(where: str, given: Iterable[str], known: Iterable[str]) -> None:
        try:
            known_keys(given, known)
        except ValueError as error:
            raise UsageError(f"{path}: {where}{error}.") from None

    keys("", table, ["about", "seed", *SCHEMA])
    about = checked("about", table.get("about", ""), TEXT)
    seed = checked("seed", table.get("seed", 0), whole(-(2**63), 2**63 - 1))
    sections: dict[str, dict[str, Any]] = {}
    for name, schema in SCHEMA.items():
        given = checked(f"[{name}]", table.get(name, {}), one_of(dict, "a table"))
        keys(f"[{name}] has ", given, schema)
        sections[name] = {key: default for key, (default, _) in schema.items()} | {
            key: checked(f"[{name}] {key}", value, schema[key][1]) for key, value in given.items()
        }
    images, text, arrivals, given = sections["images"], sections["text"], sections["arrivals"], table.get("images", {})
    folder, trace, requests = images.pop("folder"), arrivals.pop("trace"), sections.pop("own")["requests"]
    if images["weights"] and len(images["weights"]) != len(images["sizes"]):
        need = f"it must have a weight for each of the {len(images['sizes'])} sizes"
        raise wrong("[images] weights", given["weights"], need)
    if images["repeated"] and not images["count"].most:
        raise wrong("[images] repeated", images["repeated"], "it needs a count above 0")
    for key in {"kinds", "sizes", "weights"} & set(given):
        if folder is not None:
            raise wrong(f"[images] {key}", given[key], "it is for drawn images: leave it out, or folder")
    if bool(text["shared_prefix"]) != (text["shared_prefix_tokens"] > 1):
        both = f"{text['shared_prefix']} of shared_prefix_tokens {text['shared_prefix_tokens']}"
        raise UsageError(f"{path}: [text] shared_prefix is {both}; set both, the tokens to 2 or more, or neither.")
    for kind, its in ARRIVALS.items():
        for key in set(its) & set(table.get("arrivals", {})):
            if kind != arrivals["kind"]:
                need = f"it is for kind = '{kind}', not '{arrivals['kind']}'"
                raise wrong(f"[arrivals] {key}", table["arrivals"][key], need)
    if arrivals["kind"] == "trace" and trace is None:
        raise wrong("[arrivals] kind", "trace", "it needs trace = 'file.jsonl'")
    if "own" in table and requests is None:
        raise wrong("[own]", table["own"], "it needs requests = 'file.jsonl'")
    for name in ("images", "text", "output"):
        if requests is not None and name in table:
            raise wrong("[own] requests", requests, f"its bodies say all that [{name}] does: leave one of them out")
    arrivals["trace_at"] = () if trace is None else trace_times(path.parent / trace)
    sections["sampling"] = {key: value for key, value in sections["sampling"].items() if value is not None}
    return Workload(
        name=path.stem,
        about=about,
        seed=seed,
        **sections,
        own=() if requests is None else own_bodies(path.parent / requests),
        files={} if folder is None else own_files(path.parent / folder),
    )


def json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON lines file with the numbers of their lines."""
    found = []
    for line, text in enumerate(text_of(path).split("\n"), 1):  # splitlines would split at U+2028 in a text
        if text.strip():
            try:
                found.append((line, json.loads(text)))
            except ValueError as error:
                raise UsageError(f"{path}: line {line} is not JSON: {error}.") from None
            if not isinstance(found[-1][1], dict):
                raise UsageError(f"{path}: line {line} is {text.strip()[:60]}; it must be a JSON object.")
    if not found:
        raise UsageError(f"{path} is empty; it must have a JSON object on each line.")
    return found


def own_bodies(path: Path) -> tuple[dict[str, Any], ...]:
    bodies = []
    for line, body in json_lines(path):
        messages = body.get("messages")
        sound = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
        if not sound:
            raise UsageError(f"{path}: line {line}: messages must be a list of objects with role and content.")
        most = body.get("max_tokens", 1)
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise UsageError(f"{path}: line {line}: max_tokens is {most!r}; it must be a whole number from 1 up.")
        bodies.append({key: value for key, value in body.items() if key not in ("model", "stream", "stream_options")})
    return tuple(bodies)


def own_files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_TYPES and path.is_file())
    if not paths:
        raise UsageError(f"[images] folder {folder} has no images; it must have files of {', '.join(IMAGE_TYPES)}.")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def trace_times(path: Path) -> tuple[float, ...]:
    times = [0.0]
    for line, entry in json_lines(path):
        at = entry.get("at")
        if isinstance(at, bool) or not isinstance(at, int | float) or not times[-1] <= at < math.inf:
            raise UsageError(f"{path}: line {line}: at is {at!r}; it must be a number of seconds, {times[-1]} or more.")
        times.append(float(at))
    return tuple(times[1:])
