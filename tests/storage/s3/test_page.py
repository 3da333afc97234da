"""A page read fast is what ElementTree reads in it, or is refused as ElementTree refuses it."""

from __future__ import annotations

from urllib.parse import quote
from xml.sax.saxutils import escape

from hypothesis import given, settings
from hypothesis import strategies as st

from cifake_ray.storage.s3.page import Page, _parse_any_page, _parse_usual_page, parse_page

NAMESPACE = ' xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
DECLARATION = '<?xml version="1.0" encoding="UTF-8"?>\n'
TIME = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
OWNER = "<Owner><ID>1</ID><DisplayName>me</DisplayName></Owner>"
CLASS = "<StorageClass>STANDARD</StorageClass>"
CHECKSUM = (
    "<ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm><ChecksumType>FULL_OBJECT</ChecksumType>"
)
# As AWS, MinIO, Ceph and SeaweedFS write an entry.
ENTRIES = (
    f"<Contents><Key>{{key}}</Key>{TIME}<ETag>{{etag}}</ETag>{CHECKSUM}<Size>{{size}}</Size>"
    f"{CLASS}</Contents>",
    f"<Contents><Key>{{key}}</Key>{TIME}<ETag>{{etag}}</ETag><Size>{{size}}</Size>{OWNER}{CLASS}"
    "</Contents>",
    f"<Contents><Key>{{key}}</Key>{TIME}<ETag>{{etag}}</ETag><Size>{{size}}</Size>{CLASS}{OWNER}"
    "</Contents>",
    f"<Contents><Key>{{key}}</Key><ETag>{{etag}}</ETag><Size>{{size}}</Size>{CLASS}{TIME}</Contents>",
)
ETAGS = ("&quot;{}&quot;", "&#34;{}&#34;", '"{}"', "{}")

NAMES = st.text(alphabet="ab/é+% &<\"'\x01\n\udcff", min_size=1, max_size=8)


@st.composite
def make_pages(draw: st.DrawFn) -> bytes:
    entry, etag = draw(st.sampled_from(ENTRIES)), draw(st.sampled_from(ETAGS))
    keys = draw(st.lists(NAMES, max_size=6))
    entries = "".join(
        entry.format(key=quote_key(key), etag=etag.format(f"e{n}"), size=n**9)
        for n, key in enumerate(keys)
    )
    token = draw(st.sampled_from(["", "t", "a/é&b", "1==+/%"]))
    facts = [
        "<Name>b</Name>",
        "<Prefix></Prefix>",
        "<MaxKeys>1000</MaxKeys>",
        "<Delimiter/>",
        "<EncodingType>url</EncodingType>",
        f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>",
        *([f"<NextContinuationToken>{escape(token)}</NextContinuationToken>"] if token else []),
    ]
    facts = draw(st.permutations(facts))
    place = draw(st.integers(0, len(facts)))
    head, tail = "".join(facts[:place]), "".join(facts[place:])
    start = draw(st.sampled_from(["", DECLARATION])) + "<ListBucketResult"
    start += draw(st.sampled_from([">", f"{NAMESPACE}>"]))
    return f"{start}{head}{entries}{tail}</ListBucketResult>".encode()


def quote_key(key: str) -> str:
    """As S3 does with `encoding-type=url`."""
    return quote(key.encode("utf-8", "surrogateescape")).replace("%20", "+")


def read(parse: object, data: bytes) -> Page | str:
    try:
        return parse(data)  # type: ignore[operator]
    except ValueError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(make_pages())
def test_a_usual_page_is_read_without_parsing_all_of_it(data: bytes) -> None:
    page = _parse_any_page(data)
    assert _parse_usual_page(data) == (page if page.keys else None)


PIECES = [
    *(
        "<",
        ">",
        "&",
        "</",
        "/>",
        "]]>",
        "<!-- ",
        " -->",
        "<![CDATA[",
        "<?x ?>",
        "\n",
        "\x00",
        "\x7f",
    ),
    *("&lt;", "&gt;", "&amp;", "&apos;", "&quot;", "&#34;", "&#38;", "&#x3C;", "&x;", "&#0;"),
    *("<Key>", "</Key>", "<Size>", "</Size>", "<Size/>", "<ETag>", "<Contents>", "</Contents>"),
    *("<Contents/>", "<Contents >", "<Key>k</Key>", "<Size>2</Size>", "<ETag>x</ETag>", "-1", "9"),
    *("<IsTruncated>true</IsTruncated>", "<EncodingType>url</EncodingType>", "<Owner>", OWNER),
    *(' xmlns="x"', " xmlns:s='x'", "<s:Key>", "+", "%", "%FF", "%zz", "%E9", "é", "￿", "x" * 99),
    *("</ListBucketResult>", "<ListBucketResult>", "<!DOCTYPE l [<!ENTITY x 'y'>]>", DECLARATION),
]


@settings(max_examples=500, deadline=None)
@given(make_pages(), st.data())
def test_a_page_with_anything_in_it_is_read_or_refused_as_before(
    data: bytes, draws: st.DataObject
) -> None:
    for _ in range(draws.draw(st.integers(1, 3))):
        data = change_page(data, draws)
    assert read(parse_page, data) == read(_parse_any_page, data)


def change_page(data: bytes, draws: st.DataObject) -> bytes:
    """Cut a page, take a part out, write one twice or swap two, or put something in."""
    borders = [0, *(n for n, byte in enumerate(data) if byte in b"<>")]
    borders += [n + 1 for n in borders[1:]] + [len(data)]
    first, second, third = sorted(draws.draw(st.sampled_from(borders)) for _ in range(3))
    a, b, c, d = data[:first], data[first:second], data[second:third], data[third:]
    return draws.draw(
        st.sampled_from([a, a + c + d, a + b + b + c + d, a + c + b + d])
        | st.sampled_from(PIECES).map(lambda piece: a + piece.encode() + b + c + d)
        | st.binary(max_size=3).map(lambda piece: a + piece + b + c + d)
    )
