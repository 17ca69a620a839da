"""What a chest X-ray report says of the 14 CheXpert findings, by rules: mention, negation, doubt and side; no weights.

English only. It reads words, not grammar: lists of phrases, cues with a scope, and the state of heart and mediastinum. How often it
is right, and where not: docs/labeller.md. The rules are our own; what counts as a mention, a cue, and how mentions become a
label follow the CheXpert labeller.
Source: Irvin et al. 2019, AAAI (CheXpert); Peng et al. 2018, AMIA (NegBio); Chapman et al. 2001, J Biomed Inform 34:301 (scopes).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from . import labeller_phrases as phrases

FINDINGS = (phrases.NO_FINDING, phrases.ENLARGED, phrases.CARDIOMEGALY, phrases.OPACITY, phrases.LESION, phrases.EDEMA, phrases.CONSOLIDATION,
            phrases.PNEUMONIA, phrases.ATELECTASIS, phrases.PNEUMOTHORAX, phrases.EFFUSION, phrases.PLEURAL, phrases.FRACTURE,
            phrases.DEVICES)  # fmt: skip
"""In CheXpert's order."""
FIVE = (phrases.CARDIOMEGALY, phrases.EDEMA, phrases.CONSOLIDATION, phrases.ATELECTASIS, phrases.EFFUSION)
"""Those of "F1-5". Source: Irvin et al. 2019, section 5 (the competition tasks)."""

PASSED_OVER = {"indication", "indications", "history", "clinical history", "clinical information", "reason for exam", "reason for study",
                "reason for examination", "comparison", "comparisons", "technique", "procedure", "examination", "exam"}  # fmt: skip
"""Sections that say what was asked or done, not what is seen."""


@dataclass(frozen=True)
class Mention:
    """One place where a text speaks of a finding.

    sentence: index into :func:`sentences`. side: "right", "left", "both" of the patient or None. polarity: 1 present, 0
    denied, -1 doubted. span: (start, end) of the words that name it in the text. cue: of what denies it, where something does.
    """

    finding: str
    sentence: int
    side: str | None
    polarity: int
    span: tuple[int, int]
    cue: tuple[int, int] | None = None


def label(text: str) -> dict[str, int | None]:
    """{finding: 1 present | 0 denied | -1 doubted | None not spoken of} for the 14 ``FINDINGS``.

    Of several mentions the surest presence counts: 1, then -1, then 0. No Finding is 1 where the text says something of the
    chest and nothing but devices is found or doubted, 0 where something is, None (like all) where it says nothing.
    """
    found = _mentions(text)
    polarity = {f: {m.polarity for m in found if m.finding == f} for f in {m.finding for m in found}}
    out = {f: next((p for p in (1, -1, 0) if p in polarity.get(f, ())), None) for f in FINDINGS}
    something = any(p & {1, -1} for f, p in polarity.items() if f not in (phrases.DEVICES, phrases.NO_FINDING))
    return out | {phrases.NO_FINDING: int(not something) if found else None}


def mentions(text: str) -> list[Mention]:
    """All mentions of the 14 findings in the order of the text; No Finding where a sentence calls all normal."""
    return [m for m in _mentions(text) if m.finding != phrases.OTHER]


def sections(text: str) -> dict[str, str]:
    """{"findings", "impression", ...: text} by the headings in it, in small letters; "" holds what stands before the first.

    A conclusion is an impression; of two sections of one name the texts are joined.
    """
    out: dict[str, str] = {}
    for name, start, end in _sections(text):
        if part := text[start:end].strip():
            out[name] = f"{out[name]} {part}" if name in out else part
    return out


def sentences(text: str) -> list[tuple[int, int]]:
    """(start, end) of every sentence of what the report says itself: history, comparison and technique are passed over."""
    out = []
    for name, start, end in _sections(text):
        if name not in PASSED_OVER:
            marks = [start, *(m.end() for m in _SENTENCE_END.finditer(text, start, end)), end]
            out += [(a, b) for a, b in zip(marks, marks[1:]) if text[a:b].strip()]
    return out


def _mentions(text: str) -> list[Mention]:
    lower = text.translate(_LOWER)
    return [
        replace(m, sentence=i, span=(m.span[0] + start, m.span[1] + start), cue=m.cue and (m.cue[0] + start, m.cue[1] + start))
        for i, (start, end) in enumerate(sentences(text))
        for m in _read(lower[start:end])
    ]


def _sections(text: str) -> list[tuple[str, int, int]]:
    heads = list(_HEADING.finditer(text))
    edges = [("", 0, heads[0].start() if heads else len(text))]
    for head, after in zip(heads, [*(h.start() for h in heads[1:]), len(text)]):
        name = head[1].lower()
        name = "impression" if name.startswith(("impression", "conclusion")) else "findings" if name.startswith("finding") else name
        edges.append((name, head.end(), after))
    return edges


@lru_cache(1 << 14)  # reports repeat their stock sentences
def _read(sentence: str) -> tuple[Mention, ...]:
    """The mentions of one lower-case sentence; spans within it."""
    rules = _rules()
    found = list(rules.mention.finditer(sentence))
    out = [Mention(phrases.NO_FINDING, 0, None, 1, m.span()) for m in rules.all_normal.finditer(sentence)]
    if not found:
        return tuple(out)
    scopes = _Scopes(sentence, rules)
    state = None
    for i, m in enumerate(found):
        span, (names, organ) = m.span(), rules.groups[m.lastgroup]
        if m.lastgroup == "clear":
            out += [] if _covering(scopes.deny, span) else [Mention(phrases.OPACITY, 0, None, 0, span, span)]
            continue
        if organ:
            joined = i > 0 and rules.groups[found[i - 1].lastgroup][1] and _JOINED.fullmatch(sentence[found[i - 1].end() : m.start()])
            state = _state(sentence, span, scopes, rules) or (state if joined else None)
            if state is None:
                continue
            size, where = state
            polarity, cue = scopes.judge(where) if size else (0, where)
            polarity = -1 if size < 0 and polarity == 1 else polarity
        elif _covering(scopes.unsaid, span):
            continue
        else:
            polarity, cue = scopes.judge(span)
            if polarity == 1 and _alternative(sentence, found, i, scopes):
                polarity = -1
        side = None if names[0] in _MIDLINE else _side(sentence, found, i, scopes, rules)
        out += [Mention(name, 0, side, polarity, span, cue) for name in names]
    return tuple(sorted(out, key=lambda m: m.span))


class _Scopes:
    """Where the cues of a sentence reach. strong, unsaid, deny, doubt: [((start, end) of the scope, (start, end) of the cue)]."""

    def __init__(self, text: str, rules: _Rules) -> None:
        self.text, self.soft_end = text, rules.soft_end
        self.hard = [0, *(m.start() for m in rules.hard_end.finditer(text)), len(text)]
        strong = [m.span() for m in rules.strong.finditer(text)]
        masked = strong + [m.span() for m in rules.no_negation.finditer(text)]
        self.strong = [(reach, (a, b)) for a, b in strong for reach in ((b, self.forward(b)), (self.backward(a), a))]
        self.unsaid = [((m.end(), self.forward(m.end())), m.span()) for m in rules.unsaid.finditer(text)]
        self.deny = self._reach(rules.deny, rules.denied, masked)
        self.doubt = self._reach(rules.doubt, rules.doubted, strong)

    def _reach(self, ahead: re.Pattern, behind: re.Pattern, masked: list[Span]) -> list[tuple[Span, Span]]:
        free = [(m.span(), r is ahead) for r in (ahead, behind) for m in r.finditer(self.text) if not any(a <= m.start() < b for a, b in masked)]
        return [((b, self.forward(b)) if onwards else (self.backward(a), a), (a, b)) for (a, b), onwards in free]

    def forward(self, start: int) -> int:
        """End of a scope that begins here: the next barrier, or where a list under the cue gives way to a new statement."""
        end = min(h for h in self.hard if h >= start)
        soft = self.soft_end.search(self.text, start, end)
        while soft and _OR.search(self.text, soft.end(), end):  # "no A, large B, or C": the list goes on
            soft = self.soft_end.search(self.text, soft.end(), end)
        return soft.start() if soft else end

    def backward(self, end: int) -> int:
        """Start of a scope that ends here: over a whole list, else from the last comma."""
        start = max(h for h in self.hard if h <= end)
        if _LIST.search(self.text, start, end):
            return start
        soft = [m.start() for m in self.soft_end.finditer(self.text, start, end)]
        return max([start, self.text.rfind(",", start, end), self.text.rfind(" with ", start, end), *soft])

    def judge(self, span: Span) -> tuple[int, Span | None]:
        """(polarity of what stands at span, the cue that denies it)."""
        if _covering(self.strong, span):
            return -1, None
        if cue := _covering(self.deny, span):
            return 0, cue
        return (-1 if _covering(self.doubt, span) else 1), None


def _covering(scopes: list[tuple[Span, Span]], span: Span) -> Span | None:
    return next((cue for (a, b), cue in scopes if a <= span[0] and span[1] <= b), None)


def _state(text: str, span: Span, scopes: _Scopes, rules: _Rules) -> tuple[int, Span] | None:
    """(1 large | -1 borderline | 0 normal, where it says so) of the organ at span; None where it is not judged."""
    start, end = max(h for h in scopes.hard if h <= span[0]), min(h for h in scopes.hard if h >= span[1])
    before = list(rules.state.finditer(text, start, span[0]))
    if before and _BEFORE_ORGAN.fullmatch(text, before[-1].end(), span[0]):
        return _STATES[before[-1].lastgroup], before[-1].span()
    after = rules.state.search(text, span[1], end)
    if after and (after.lastgroup == "normal" or not _OTHER_SUBJECT.search(text, span[1], after.start())):
        return _STATES[after.lastgroup], after.span()
    return None


def _alternative(text: str, found: list[re.Match], i: int, scopes: _Scopes) -> bool:
    """Whether "or" or "versus" joins this mention to the next or the last."""
    gaps = [(found[j].end(), found[j + 1].start()) for j in (i - 1, i) if 0 <= j < len(found) - 1]
    return any(b - a <= 40 and _OR.search(text, a, b) and not any(a <= h < b for h in scopes.hard[1:-1]) for a, b in gaps)


def _side(text: str, found: list[re.Match], i: int, scopes: _Scopes, rules: _Rules) -> str | None:
    """The side named before a mention since the last one, else after it and before the next one's own words."""
    a, b = found[i].span()
    start = max(max(h for h in scopes.hard if h <= a), found[i - 1].end() if i else 0)
    stops = [h for h in scopes.hard if h >= b and not text.startswith(("is ", "are "), h)]  # "is seen on the left" goes on
    end = min(min(stops), found[i + 1].start() if i + 1 < len(found) else len(text))
    if i and (cut := _NEXT_PART.search(text, start, a)):
        start = cut.start()
    cut = _NEXT_PART.search(text, b, end) if i + 1 < len(found) else None
    for window in (text[start:b], text[b : cut.start() if cut else end]):
        if sides := {m.lastgroup for m in rules.side.finditer(window)}:
            return sides.pop() if len(sides) == 1 else "both"
    return None


class _Rules:
    """The phrases as compiled expressions. groups: {name of a group of ``mention``: (its findings, whether it is an organ)}."""

    def __init__(self) -> None:
        self.groups = {"clear": ((phrases.OPACITY,), False)}
        parts = [f"(?P<clear>{_spaced(phrases.CLEAR_LUNGS)})"]
        for table, organ in ((phrases.MENTIONS, False), (phrases.ANATOMY, True)):
            for names, patterns in table.items():
                key = f"g{len(self.groups)}"
                self.groups[key] = (names if isinstance(names, tuple) else (names,), organ)
                parts.append(f"(?P<{key}>{_spaced('|'.join(patterns))})")
        self.mention = _words("|".join(parts))
        states = {"borderline": phrases.BORDERLINE_STATE, "normal": phrases.NORMAL_STATE, "large": phrases.LARGE_STATE}
        self.state = _words("|".join(f"(?P<{k}>{_spaced(v)})" for k, v in states.items()))
        self.all_normal = _words(_spaced(phrases.ALL_NORMAL))
        self.side = _words(f"(?P<right>{_spaced(phrases.RIGHT)})|(?P<left>{phrases.LEFT})|(?P<both>{phrases.BOTH})")
        self.strong, self.no_negation, self.unsaid = map(_words, (phrases.DOUBT_STRONG, phrases.NOT_NEGATION, phrases.UNSAID))
        self.deny, self.denied, self.doubt, self.doubted = map(_words, (phrases.DENY, phrases.DENIED, phrases.DOUBT, phrases.DOUBTED))
        self.hard_end = re.compile(rf"[:]|\b(?:{phrases.SCOPE_END})\b")
        self.soft_end = re.compile(rf"(?:,| and| with)(?: and)? (?={phrases.LIST_ENDS_BEFORE}\b)")


@lru_cache
def _rules() -> _Rules:
    return _Rules()


def _spaced(patterns: str) -> str:
    spaces = {" ": "[ -]+", " ?": "[ -]*"}
    return re.sub(r"\(\?<[!=][^)]*\)| \??", lambda m: spaces.get(m[0]) or m[0].replace(" ", "[ -]"), patterns)


def _words(patterns: str) -> re.Pattern:
    return re.compile(rf"\b(?:{patterns})(?!\w)")


Span = tuple[int, int]
_LOWER = {**{i: i + 32 for i in range(65, 91)}, 9: 32, 10: 32, 13: 32}  # keeps every position, as str.lower does not
_HEADING = re.compile(
    r"\b(findings?|impressions?|conclusions?|indications?|(?:clinical )?history|clinical information|"
    r"reason for (?:exam|study|examination)|comparisons?|technique|procedure|examination|exam|recommendations?)\s*:", re.IGNORECASE)  # fmt: skip
_SENTENCE_END = re.compile(r"(?<!\bvs)(?<!\bdr)(?<!\bapprox)[.!?](?=\s|$|[A-Z])|;|\n(?=\s*(?:[A-Z]|\d+[.)]|[-*•]))")
_OR = re.compile(r"\b(?:or|nor|versus|vs)\b|/")
_LIST = re.compile(r"\b(?:or|nor)\b|, and ")
_JOINED = re.compile(r",? ?(?:and|or|/) ?(?:the )?(?:(?!stable|unchanged)\w+ )?")
_STATES = {"normal": 0, "borderline": -1, "large": 1}
_BEFORE_ORGAN = re.compile(
    r"(?: (?:of|the|in|size|sized|overall|stable|appearing|appearance|for|transverse|configuration|superior|upper|xxxx|contour|shape)){0,5} "
)
_OTHER_SUBJECT = re.compile(
    r"\b(?:with|aort\w*|hil\w+|vascul\w*|vessels?|lungs?|pulmonary|marking\w*|interstit\w*|arter\w+|knob|fat|azygos|thyroid)\b|,"
)
_NEXT_PART = re.compile(r",| and | with | as well as ")
_MIDLINE = {phrases.CARDIOMEGALY, phrases.ENLARGED}
