"""YAML by the rules of version 1.2, read strictly: duplicate keys are errors; merge keys (`<<`), which are 1.1's, work.

A text becomes nodes, which know their lines; `prepare` checks and merges them before values are made of them.
"""

import re

import yaml

from mdpo.errors import UserError

MERGE = "tag:yaml.org,2002:merge"
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}


class Loader(yaml.SafeLoader):
    """YAML 1.2 scalars only: PyYAML's own rules are 1.1, where 4e-7 is text, `no` is false and 010 is eight."""

    yaml_implicit_resolvers = {}


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


for _name, _pattern, _read in (
    ("null", r"~|null|Null|NULL|", lambda text: None),
    ("bool", r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    ("int", r"[-+]?[0-9]+", int),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", lambda text: _read_float(text)),
):
    _tag = f"tag:yaml.org,2002:{_name}"
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), None)
    Loader.add_constructor(_tag, lambda loader, node, read=_read: read(loader.construct_scalar(node)))
Loader.add_implicit_resolver(MERGE, re.compile(r"<<\Z"), ["<"])
# A merge key's own tag means something as a key alone; elsewhere << is text.
Loader.add_constructor(MERGE, lambda loader, node: loader.construct_scalar(node))


def _read_float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def prepare(node: yaml.Node | None, origin: str) -> None:
    """Refuses duplicate keys and resolves merge keys, at any depth, in place. Raises UserError that names lines."""
    if node is not None:
        _refuse_duplicates(node, origin, set())
        _merge(node, origin, {})


def _refuse_duplicates(node: yaml.Node, origin: str, seen: set[int]) -> None:
    """Raise UserError with both lines where a mapping, at any depth, has a key twice. `seen`: ids of nodes visited."""
    if id(node) in seen or isinstance(node, yaml.ScalarNode):
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    for item in node.value:
        key, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                both = f"line {lines[key.value]} and again on line {line}"
                raise UserError(f"{origin}: key {key.value!r} is on {both}.", key.value)
            lines[key.value] = line
        _refuse_duplicates(value, origin, seen)


def _merge(node: yaml.Node, origin: str, done: dict[int, bool]) -> None:
    """Puts what merge keys name into each mapping: its own keys win, then those of the mapping named first. `done`: the
    ids of nodes visited, False while one is in hand."""
    if isinstance(node, yaml.ScalarNode) or id(node) in done:
        return
    done[id(node)] = False
    for item in node.value:
        _merge(item[1] if isinstance(node, yaml.MappingNode) else item, origin, done)
    if isinstance(node, yaml.MappingNode) and any(key.tag == MERGE for key, _ in node.value):
        own = [pair for pair in node.value if pair[0].tag != MERGE]
        seen = {key.value for key, _ in own if isinstance(key, yaml.ScalarNode)}
        added = []
        for key, value in node.value:
            for source in _sources(key, value, origin, done) if key.tag == MERGE else []:
                fresh = [p for p in source.value if not (isinstance(p[0], yaml.ScalarNode) and p[0].value in seen)]
                seen |= {key.value for key, _ in fresh if isinstance(key, yaml.ScalarNode)}
                added += fresh
        node.value = added + own
    done[id(node)] = True


def _sources(key: yaml.Node, value: yaml.Node, origin: str, done: dict[int, bool]) -> list[yaml.MappingNode]:
    """The mappings that a merge key names, one or a list of them."""
    sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
    place = f"{origin}: << on line {key.start_mark.line + 1}"
    if not all(isinstance(source, yaml.MappingNode) for source in sources):
        raise UserError(f"{place} takes a mapping, or a list of them; write <<: *ANCHOR of a mapping.", "<<")
    if not all(done[id(source)] for source in sources):
        raise UserError(f"{place} names the mapping that it is in.", "<<")
    return sources


def refuse_words(node: yaml.Node, origin: str, strict: bool = False) -> None:
    """Raises UserError where a value inside a mapping or a list is None, nil, yes, no, on or off without quotes: YAML
    1.2 reads text, and nothing would be switched off by it. `strict`: `none`, and such words in quotes, too."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(None, item) for item in node.value]
    for key, value in pairs:
        name = f".{key.value}" if key is not None else ""
        if not isinstance(value, yaml.ScalarNode):
            refuse_words(value, f"{origin}{name}", strict)
            continue
        text = value.value
        null = text in ("None", "NONE", "nil", "Nil", "NIL") or (strict and text.lower() in ("none", "null"))
        if null and value.tag.endswith(":str") and (value.style is None or strict):
            raise UserError(f"{origin}{name}: {text} is a text here; write null.")
        if key is not None and value.style is None and text.lower() in SWITCHES:
            truth = str(SWITCHES[text.lower()]).lower()
            raise UserError(f"{origin}{name}: {text} is a text here; write {truth}, or quote it as '{text}'.")


def syntax(origin: str, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    return f"{origin}{line}: is not valid YAML: {getattr(error, 'problem', None) or error}."
