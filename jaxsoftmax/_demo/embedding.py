"""Pictures inside the page: no second file, nothing to load."""

import base64


def data_uri(content: bytes, media_type: str) -> str:
    """Encodes a picture as the address of an `<img>`."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def svg_image(content: bytes, alt: str) -> str:
    """Makes an `<img>` of an SVG picture; `alt` is told to those who cannot see it."""
    return f'<img class="figure" src="{data_uri(content, "image/svg+xml")}" alt="{alt}">'
