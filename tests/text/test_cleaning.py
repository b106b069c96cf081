"""clean_caption: what goes and what stays."""

import pytest

from imagen_lightning.text import clean_caption


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red star on a white background", "a red star on a white background"),
        ("salt &amp; pepper &quot;shaker&quot;", 'salt & pepper "shaker"'),
        ("twice &amp;amp; escaped", "twice & escaped"),
        ("<b>Bold</b> cat<br/>on a <a href='http://x.y'>mat</a>", "Bold cat on a mat"),
        ("&lt;p class=&quot;c&quot;&gt;a dog&lt;/p&gt;", "a dog"),
        ("before<script>var x = 1 < 2;</script>after <!-- a > b --> end", "before after end"),
        ("I <3 cats, 1 < 2 > 0", "I <3 cats, 1 < 2 > 0"),
        ("a cat, see https://example.com/a?b=c#d, on a mat", "a cat, see, on a mat"),
        ("a cat (www.example.org/pic)", "a cat"),
        ("photo of a barn - shutterstock.com", "photo of a barn"),
        ("write to first.last@example.co.uk for prints", "write to for prints"),
        ("sunset by @some_one and friends", "sunset by and friends"),
        ("meet @ noon", "meet @ noon"),
        ("IMG_1234.JPG", ""),
        ("my-holiday_01.final.jpeg: a beach", "a beach"),
        ("St. Peter's at 3.5 miles. The end.", "St. Peter's at 3.5 miles. The end."),
        ("a\tb\r\n c\x00d\x07e", "a b c d e"),
        ("zero\u200bwidth \ufeffmark soft\u00adhyphen", "zerowidth mark softhyphen"),
        ("crème brûlée 日本語 красный", "crème brûlée 日本語 красный"),
        ("a family \U0001f468\u200d\U0001f469\u200d\U0001f467", "a family \U0001f468\u200d\U0001f469\u200d\U0001f467"),
        ("lone \ud800 surrogate", "lone surrogate"),
        ("  - | ", ""),
        ("", ""),
    ],
)
def test_clean_caption(caption, expected):
    cleaned = clean_caption(caption)
    assert cleaned == expected
    assert clean_caption(cleaned) == cleaned
