"""Colours on light and on dark paper: the page and its pictures follow the reader's system."""

from jaxsoftmax._demo.models import MODELS

# Each name with its colour on light and on dark paper. A picture is drawn in the light colours.
_COLOURS = {
    "ink": ("#1d2430", "#e9ebef"),
    "soft": ("#56606e", "#a9b2be"),
    "line": ("#e3e6ea", "#333b47"),
    "mute": ("#a3abb6", "#6c7684"),
    "paper": ("#fbfaf7", "#14181f"),
    "card": ("#ffffff", "#1c222b"),
    **{model.name: (model.colour, model.dark_colour) for model in MODELS},
}
INK, SOFT, LINE, MUTE = (_COLOURS[name][0] for name in ("ink", "soft", "line", "mute"))


def style() -> str:
    """Builds the CSS that gives each name its colour."""
    light, dark = (
        "".join(f"--{name}:{colours[side]};" for name, colours in _COLOURS.items())
        for side in (0, 1)
    )
    return f":root{{{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def variable(name: str) -> str:
    """Says in CSS which colour a name has."""
    return f"var(--{name})"


def themed(svg: str) -> str:
    """Makes an SVG picture follow the reader's system."""
    for name, (light, _) in _COLOURS.items():
        svg = svg.replace(light, variable(name))
    head, start, rest = svg.partition("<svg")
    tag, end, body = rest.partition(">")
    return f"{head}{start}{tag}{end}<style>{style()}</style>{body}"
