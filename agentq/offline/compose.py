"""Writes an agent's answer: sentences taken from tool results and retrieved texts, with citations. Adds no facts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from agentq.offline.observe import Document, Observation, observe
from agentq.offline.parts import NAMED_THING, Part, meaning
from agentq.offline.plan import Plan, Want, about, asked_again, is_advice, key_of, leaning
from agentq.offline.prompt import Turn
from agentq.offline.text import STEP, coverage, overlap, sentences, stem_set, stems, weights
from agentq.offline.toolbox import Param, Tool

RELEVANT = 0.45  # share of a part's words that a text must speak of to be an answer to it
MAX_SENTENCES = 5
NEARLY_AS_FIT = 0.7  # how well a second document must fit, beside the best, to add a sentence
STEPS_BONUS = 2.0  # for a text with steps, where a question asks how to do something
MAX_SENTENCES_OF_STEPS = 8
_HOW_TO = re.compile(
    r"\bhow (?:do|can|to|should|would)\b|\bwhat (?:should|can|do|must) i do\b|\bsteps?\b|\bfix\b", re.I
)
_UPSET = re.compile(
    r"unacceptable|disgrace|ridiculous|terrible|awful|angry|furious|fed up|outrage|worst|disappointed|annoyed|upset|!!"
    r"|\bscandal|\bjoke\b",
    re.IGNORECASE,
)
_SCOPE = re.compile(r"\byou (?:can )?help (?:\w+ )?with ([^.\n]{5,200})\.", re.IGNORECASE)
_STEPS = re.compile(STEP.pattern, re.MULTILINE)
_NAMED = re.compile(rf"(?:\b\w+ )?(?:{NAMED_THING.pattern})")  # a named thing with the word before it: order AB-12
_THANKS = re.compile(r"\b(?:thanks?|thank you|cheers|thx)\b", re.IGNORECASE)
_QUOTED = re.compile(r"'([^']+)'")


@dataclass(frozen=True, slots=True)
class Source:
    """A sentence of a document, the number of its paragraph (from 1), and the document it is from."""

    text: str
    paragraph: int
    document: Document
    tokens: frozenset[str]


def compose(turn: Turn, plan: Plan) -> str:
    """The answer to every part, in the parts' order; parts without an answer are named honestly."""
    results = {key_of(call): observe(call.result) for call in turn.calls if call.result is not None}
    said: list[str] = []
    paragraphs = [_part_answer(index, turn, plan, results, said) for index in range(len(plan.parts))]
    paragraphs = [paragraph for paragraph in paragraphs if paragraph]
    if asked := asked_again(plan):
        paragraphs.append(_ask(asked))
    if not paragraphs:
        paragraphs = [_nothing(turn)]
    answer = "\n\n".join(paragraphs)
    if _UPSET.search(turn.request):
        answer = f"I am sorry for the trouble. {answer}"
    return _mended(answer, turn)


def _part_answer(index: int, turn: Turn, plan: Plan, results: Mapping[str, Observation], said: list[str]) -> str:
    """What the results say about one part, nothing twice."""
    part, tools = plan.parts[index], plan.tools
    wants = [want for want in plan.wants if want.part == index]
    told = [
        sentence
        for want in _told(wants, results, tools)
        for sentence in _sayings(want, results[want.key], part, whole=not tools[want.tool].reads)
    ]
    documents = [document for want in wants if want.key in results for document in results[want.key].documents]
    found = _extract(part, leaning(plan.parts, index), documents, own=bool(told)) if documents else None
    lines = [line for line in [*told, *(found or [])] if line not in said]
    said += lines
    if told or found or any(want.missing for want in wants):
        return _joined(lines)
    return _nothing_about(part, turn, several=len(plan.parts) > 1)


def _told(wants: list[Want], results: Mapping[str, Observation], tools: Mapping[str, Tool]) -> list[Want]:
    """The calls whose results are told in words: not documents, and not what a later act says anew."""
    spoken = [want for want in wants if want.key in results and not results[want.key].documents]
    return [want for place, want in enumerate(spoken) if not _said_anew(want, spoken[place + 1 :], results, tools)]


def _said_anew(want: Want, later: list[Want], results: Mapping[str, Observation], tools: Mapping[str, Tool]) -> bool:
    """Whether a later deed carried this look-up's arguments: its report or refusal says what matters of them."""
    if results[want.key].failed or not tools[want.tool].reads:
        return False
    arguments = set(_plain(want.arguments))
    return any(not tools[act.tool].reads and arguments <= set(_plain(act.arguments)) for act in later)


def _plain(arguments: Mapping[str, object]) -> Iterable[tuple[str, object]]:
    return [(key, value) for key, value in arguments.items() if isinstance(value, str | int | float)]


def _sayings(want: Want, seen: Observation, part: Part, *, whole: bool) -> list[str]:
    """A refusal or the report of a deed in full; of a record its first sentence and those the part asks about."""
    spoken = list(sentences(seen.message))
    if seen.failed and (seen.retryable or not spoken):
        return [f"One step did not work on our side: {want.tool.replace('_', ' ')} gave no result.", *spoken]
    if seen.failed or whole:
        return spoken
    asked = set(about(part)) - set(meaning(spoken[0])) if spoken else set()
    return spoken[:1] + [s for s in spoken[1:] if asked & set(meaning(s))]


def _extract(part: Part, leans_on: str, documents: list[Document], *, own: bool) -> list[str] | None:
    """The passage that answers a part, from the document that fits best, and what a second one adds, both cited.

    None if no document speaks of what is asked. ``own``: the part has an answer already, so less is taken for one.
    """
    unique = list({document.id: document for document in documents}.values())
    sources = [list(_sources(document)) for document in unique]
    weight = weights([source.tokens for group in sources for source in group])
    question = _Question.of(part, leans_on)
    ranked = sorted(range(len(unique)), key=lambda i: -question.fits(unique[i]) + 0.8 * i)
    enough = RELEVANT + (0.15 if own and part.mood != "problem" and not is_advice(part) else 0.0)
    best = next((i for i in ranked if question.is_met_by(unique[i], weight, enough)), None)
    if best is None:
        return None
    passage = _passage(part, sources[best], question.asked, weight)
    covered = frozenset[str]().union(*(source.tokens for source in passage), stem_set(unique[best].title))
    near = [i for i in ranked if i != best and question.fits(unique[i]) >= NEARLY_AS_FIT * question.fits(unique[best])]
    extra = next((s for i in near if (s := _addition(sources[i], question.asked, covered, weight))), None)
    return _cited(passage) + (_cited([extra]) if extra else [])


@dataclass(frozen=True, slots=True)
class _Question:
    """What a part asks: all its stems, the core that an answer must speak of, and what it leans on."""

    asked: tuple[str, ...]
    core: tuple[str, ...]
    leans_on: tuple[str, ...]
    trust: float
    wants_steps: bool

    @classmethod
    def of(cls, part: Part, leans_on: str) -> _Question:
        bare = Part(_NAMED.sub(" ", part.text), part.mood, _NAMED.sub(" ", part.context))
        core, before = meaning(bare.text), meaning(_NAMED.sub(" ", leans_on))
        asked = about(bare) if meaning(bare.whole) else before
        trust = 1.5 if part.refers_back or part.goes_on else 0.6
        return cls(asked, core if len(set(core)) > 1 else asked, before, trust, _HOW_TO.search(part.whole) is not None)

    def is_met_by(self, document: Document, weight: Mapping[str, float], enough: float) -> bool:
        """Whether a document speaks of enough of the core; less will do if its title has what is to be done."""
        body, title = stem_set(f"{document.title} {document.text}"), stem_set(document.title)
        titled = self.wants_steps and bool(title & set(self.asked[:1]))
        return coverage(self.core, body, weight) >= (enough / 2 if titled else enough)

    def fits(self, document: Document) -> float:
        """How well a document fits: how often it speaks of what is asked, its title more; then of what is leant on."""
        steps = STEPS_BONUS if self.wants_steps and len(_STEPS.findall(document.text)) > 1 else 0.0
        own = (
            _mentions(self.asked, document) + (_mentions(self.core, document) + _mentions(self.core[:1], document)) / 2
        )
        return own + steps + self.trust * _mentions(self.leans_on, document)


def _mentions(asked: tuple[str, ...], document: Document) -> float:
    """For each stem one plus the logarithm of how often the text has it, and 1.5 more if the title does."""
    counts, title = _counts(document), stem_set(document.title)
    return sum((1 + math.log(counts[token]) if counts[token] else 0.0) + 1.5 * (token in title) for token in set(asked))


@lru_cache(maxsize=4096)
def _counts(document: Document) -> Counter[str]:
    return Counter(stems(document.text))


@lru_cache(maxsize=1024)
def _sources(document: Document) -> tuple[Source, ...]:
    """The sentences of a document with their paragraphs; a list of steps belongs to what introduces it."""
    found: list[Source] = []
    paragraph = 0
    for block in re.split(r"\n\s*\n", document.text):
        lines = sentences(block)
        paragraph += 0 if lines and STEP.match(lines[0]) else 1
        found += [Source(line, paragraph, document, stem_set(line)) for line in lines]
    return tuple(found)


def _passage(part: Part, sources: list[Source], asked: tuple[str, ...], weight: Mapping[str, float]) -> list[Source]:
    """The paragraph that speaks most of the part, after the text's opening; all steps if steps are asked for."""
    steps = [place for place, source in enumerate(sources) if STEP.match(source.text)]
    if len(steps) >= 2 and (part.mood in ("problem", "statement") or _HOW_TO.search(part.whole)):
        listed = sources[max(0, steps[0] - 1) : steps[-1] + 1][:MAX_SENTENCES_OF_STEPS]
        return listed + _beside(listed, sources, asked, weight)
    paragraphs = [[s for s in sources if s.paragraph == number] for number in sorted({s.paragraph for s in sources})]
    best = max(paragraphs, key=lambda group: (_speaks(group, asked, weight), -group[0].paragraph))
    passage = _window(best, asked, weight)
    opening = stem_set(f"{sources[0].document.title} {sources[0].text}")
    return passage if sources[0] in passage or not opening & set(asked) else [sources[0], *passage]


def _beside(
    passage: list[Source], sources: list[Source], asked: tuple[str, ...], weight: Mapping[str, float]
) -> list[Source]:
    """The sentence outside a list of steps that speaks most of what is asked, if it speaks of two words or more."""
    others = [source for source in sources if source not in passage and len(source.tokens & set(asked)) > 1]
    return [max(others, key=lambda source: overlap(asked, source.tokens, weight))] if others else []


def _speaks(group: list[Source], asked: tuple[str, ...], weight: Mapping[str, float]) -> float:
    """What a paragraph speaks of counts once, repetition a quarter; the first paragraph says what a text is about."""
    spoken = frozenset[str]().union(*(source.tokens for source in group))
    repeated = sum(overlap(asked, source.tokens, weight) for source in group)
    return overlap(asked, spoken, weight) + 0.25 * repeated + 0.8 / max(1, group[0].paragraph)


def _window(group: list[Source], asked: tuple[str, ...], weight: Mapping[str, float]) -> list[Source]:
    """A paragraph, or of a long one the neighbouring sentences that speak most of what is asked."""
    size = MAX_SENTENCES_OF_STEPS if any(STEP.match(source.text) for source in group) else MAX_SENTENCES
    starts = range(max(1, len(group) - size + 1))
    heard = [sum(overlap(asked, s.tokens, weight) for s in group[start : start + size]) for start in starts]
    start = max(starts, key=lambda place: (heard[place], -place))
    return group[start : start + size]


def _addition(
    sources: list[Source], asked: tuple[str, ...], covered: frozenset[str], weight: Mapping[str, float]
) -> Source | None:
    """The sentence of another document that speaks of words the first passage does not."""
    left = [token for token in dict.fromkeys(asked) if token not in covered]
    total = sum(weight.get(token, 0.0) for token in dict.fromkeys(asked))
    if not left or not sources:
        return None
    best = max(sources, key=lambda source: overlap(left, source.tokens, weight))
    gain = overlap(left, best.tokens, weight)
    return best if total and gain / total >= 0.4 and overlap(asked, best.tokens, weight) / total >= 0.5 else None


def _cited(passage: list[Source]) -> list[str]:
    """The sentences, the last one with the citation of their document."""
    lines = [source.text for source in passage]
    if lines:
        lines[-1] = f"{lines[-1]} [{passage[-1].document.id}]"
    return lines


def _joined(lines: list[str]) -> str:
    """Sentences in one paragraph; steps, and what comes before and after them, on lines of their own."""
    text, step_before = "", False
    for line in lines:
        step = STEP.match(line) is not None
        text += ("" if not text else "\n" if step or step_before else " ") + line
        step_before = step
    return text


def _ask(params: list[Param]) -> str:
    wanted = " and ".join(param.description.rstrip(".") for param in params)
    return f"To look into this, I need one more thing from you: {wanted[0].lower()}{wanted[1:]}. Please send it to us."


def _nothing_about(part: Part, turn: Turn, *, several: bool) -> str:
    if not meaning(part.whole) and not stems(part.whole):
        return ""
    if not several:
        return _nothing(turn)
    about_it = part.text.rstrip(".?! ")
    return f'About "{about_it}": I found nothing in the sources I can use, so I cannot answer that.'


def _nothing(turn: Turn) -> str:
    """An honest refusal; to a greeting or thanks, which ask nothing, an offer."""
    scope = _SCOPE.search(turn.system)
    if not meaning(turn.request) and not NAMED_THING.search(turn.request):
        offer = f"I can help with {scope.group(1).strip()}." if scope else "Tell me what it is about."
        return f"{'You are welcome.' if _THANKS.search(turn.request) else 'Hello, what can I do for you?'} {offer}"
    sorry = "I am sorry, I cannot help with that: I found nothing about it in the sources I can use."
    return f"{sorry} I can help with {scope.group(1).strip()}." if scope else sorry


def _mended(answer: str, turn: Turn) -> str:
    """The answer without the sentences that hold what a reviewer objected to as unsupported."""
    wrong = [q for problem in turn.problems if "answer" not in problem for q in _QUOTED.findall(problem)]
    if not wrong:
        return answer
    kept = ["".join(_without(line, wrong)) for line in answer.split("\n")]
    return "\n".join(kept).strip() or _nothing(turn)


def _without(line: str, wrong: list[str]) -> list[str]:
    found = sentences(line)
    if not any(item in line for item in wrong):
        return [line]
    return [" ".join(s for s in found if not any(item in s for item in wrong))]
