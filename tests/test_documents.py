"""What can be attached: kinds of files, encodings, folders and patterns, pages of the web, and what is hostile."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest

from clex_local.documents import attachments, encodings, folders, kinds, web, worker
from clex_local.documents import docx as word
from clex_local.documents import html as web_page
from clex_local.documents import pdf as portable
from clex_local.documents.attachments import attach, texts, without_twice
from clex_local.documents.document import DocumentError
from clex_local.documents.ignored import Ignored, glob_pattern
from clex_local.documents.kinds import text_of
from clex_local.documents.typed_paths import typed_paths
from clex_local.documents.web import fetch
from helpers.made_up_documents import W, docx, paragraph, pdf

pytestmark = pytest.mark.chat


def refusal(data: bytes, name: str = "file") -> str:
    with pytest.raises(DocumentError) as caught:
        text_of(data, name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{name}: ")
    return message.removeprefix(f"{name}: ")


# Kinds


def test_the_text_of_a_pdf():
    text, notes = text_of(pdf("Grüße (1)\nline 2", "second page"), "a.pdf")
    assert text == "Grüße (1)\nline 2\n\nsecond page"
    assert notes == []


def test_a_scanned_pdf_says_so():
    assert refusal(pdf(None, None), "scan.pdf").startswith("a PDF of 2 scanned pages without text; OCR adds it")
    text, notes = text_of(pdf("text", None), "half.pdf")
    assert (text, notes) == ("text", ["1 of 2 pages have no text: scanned, or pictures"])


def test_a_pdf_that_cannot_be_read():
    assert refusal(pdf("secret", encrypted=True)) == "an encrypted PDF; save a copy without a password"
    assert refusal(b"%PDF-1.7 and nothing more").startswith("a damaged PDF file (")


def test_the_text_of_a_word_document():
    cell = "<w:tc>{}</w:tc>"
    row = "<w:tr>" + cell.format(paragraph("a")) + cell.format(paragraph("b") + paragraph("c")) + "</w:tr>"
    item = "<w:numPr><w:ilvl w:val='0'/></w:numPr>"
    body = (
        paragraph("Title", "<w:pStyle w:val='Heading1'/>")
        + "<w:p><w:r><w:t>One</w:t><w:tab/><w:t>two</w:t><w:br/><w:t>three</w:t></w:r>"
        + "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
        + "<w:moveFrom><w:r><w:t>was here</w:t></w:r></w:moveFrom></w:p>"
        + paragraph("first", item)
        + paragraph("second", item)
        + f"<w:tbl>{row}</w:tbl>"
    )
    notes = f'<w:footnotes xmlns:w="{W}"><w:footnote>{paragraph("below")}</w:footnote></w:footnotes>'
    expected = "# Title\n\nOne\ttwo\nthree\n\n- first\n- second\n\na | b c\n\nFootnotes\n\nbelow"
    assert text_of(docx(body, footnotes=notes), "a.docx") == (expected, [])
    assert text_of(docx(paragraph("x")), "without an ending")[0] == "x"


def test_a_word_document_that_cannot_be_read(monkeypatch):
    assert refusal(b"PK\3\4 no", "a.docx").startswith("a damaged Word document (")
    assert refusal(docx("<w:p>"), "a.docx").startswith("a damaged Word document (mismatched tag")
    assert refusal(docx("<w:p>" * 500 + "</w:p>" * 500), "a.docx").endswith("(its elements are too deep)")
    entities = f'<!DOCTYPE a [<!ENTITY b "c">]><w:footnotes xmlns:w="{W}">&b;</w:footnotes>'
    assert "defines entities" in refusal(docx(paragraph("x"), footnotes=entities), "a.docx")
    monkeypatch.setattr(word, "_LARGEST", 100_000)
    bomb = docx(paragraph("a" * 1_000_000))
    assert len(bomb) < 10_000
    with pytest.raises(DocumentError, match=r"unpacks to more than .*a ZIP bomb"):
        word.read(bomb, "bomb.docx")


PAGE = """<!doctype html><html><head><title>A page</title><meta charset="utf-8"><style>p {color: red}</style>
<script>alert("not this")</script></head><body><nav hidden>menu</nav>
<h2>Part</h2><p>One   &amp;
two<br>three <b>bold</b><script>nor this</script></p>
<p style="display: none">nor that</p>
<ul><li>first<li>second</ul><table><tr><th>a</th><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>
<pre>  code
    more</pre></body></html>"""


def test_the_text_of_a_web_page():
    text, notes = text_of(PAGE.encode(), "page")
    assert text == (
        "A page\n\n## Part\n\nOne & two\nthree bold\n\n- first\n- second\n\na | b\nc | d\n\n  code\n    more"
    )
    assert notes == []


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (
            "<head><title>T</title><style>x</style></head><body>a<svg><title>s</title></svg>b<noscript>c</noscript> d",
            "T\n\nab d",
        ),
        ("<title>T</title><p>a<p>b", "T\n\na\n\nb"),
        ("<head><title>T</title><meta name=x><body>a<b>c", "T\n\nac"),
        ("<body><ul><li hidden>x<ul><li>y</ul><li>two<li>three</ul><p hidden>x<p>b", "- two\n- three\n\nb"),
        ("<body><div><p hidden>x <b>x</b></div>b", "b"),
        ("<body><div hidden>x</b></span><div>x</div>x</div>z", "z"),
        ("<body><table><tr hidden><td>x<td>x<tr><td>c<td>d</table>e", "c | d\n\ne"),
        ("<body><div>a<select><option>x</div>b", "a\nb"),
    ],
)
def test_what_is_not_shown_ends_where_a_browser_ends_it(page, text):
    assert text_of(f"<!doctype html><html>{page}".encode(), "a.html")[0] == text


def test_a_web_page_of_deep_elements_takes_no_time():
    deep = "<div>" * 50_000 + "x" + "</div>" * 50_000 + "<pre>" + " " * 50_000 + "y"
    assert web_page.read(deep.encode(), "a.html")[0].split() == ["x", "y"]


def test_a_web_page_has_an_encoding_of_its_own():
    page = '<html><meta charset="iso-8859-2"><p>Łódź</p>'.encode("iso-8859-2")
    assert text_of(page, "page.html") == ("Łódź", ["read as iso-8859-2"])


def test_a_web_page_without_text():
    assert refusal(b"<html><script>make()</script>").startswith("a web page without text")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture, not text; pictures are not read"),
        (b"\x7fELF" + bytes(50), "a program, not text; programs are not read"),
        (b"GGUF" + bytes(50), "a model, not text; models are named without -f"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(50),
            "an old or an encrypted Office file, not text; save it as .docx",
        ),
        (b"{\\rtf1 text}", "a Rich Text file, not text; save it as .docx or text"),
        (b"\x1f\x8b\x08" + bytes(50), "an archive, not text; unpack it"),
        (b"ab\0cd", "a binary file, not text"),
        (b"\xff\x00\x01\x02", "a binary file, not text"),
    ],
)
def test_what_is_no_document(data, message):
    assert refusal(data).startswith(message)


# Encodings


@pytest.mark.parametrize(
    ("text", "encoding", "note"),
    [
        ("Grüße aus Köln, schöne Straßen und größere Häuser.\n" * 3, "utf-8", None),
        ("Grüße", "utf-8-sig", None),
        ("Grüße", "utf-16", "read as UTF-16"),
        ("Grüße", "utf-32", "read as UTF-32"),
        ("ASCII first.\n" * 9999 + "Grüße aus Köln, schöne Straßen und größere Häuser.\n", "cp1252", "cp1252"),
        ("Съешь же ещё этих мягких французских булок, да выпей чаю.\n" * 5, "cp1251", "cp1251"),
        ("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n" * 5, "shift_jis", None),
    ],
)
def test_encodings(text, encoding, note):
    found, notes = text_of(text.encode(encoding), "a.txt")
    assert found == text
    if encoding.startswith("utf"):
        assert notes == ([note] if note else [])
    else:
        (said,) = notes
        assert said.startswith("not UTF-8, read as ")
        assert note is None or said.endswith(note)


@pytest.mark.parametrize(
    ("data", "characters"),
    [("größer, Übung\n".encode() * 20 + b"\xff\xfe, K\xf6ln\n" + "schöne Straße".encode() * 9, "3 characters"),
     (("Привет, мир! " * 20).encode()[:-5], "1 character")],
)  # fmt: skip
def test_a_few_damaged_characters_do_not_make_it_another_encoding(data, characters):
    text, (note,) = text_of(data, "a.txt")
    assert text == data.decode("utf-8", "replace")
    assert note == f"damaged UTF-8: {characters} cannot be read"


def test_a_text_about_pdf_is_text():
    text = "# PDF\nSuch files begin with %PDF-1.7, and `%PDF-` is looked for.\n"
    assert text_of(text.encode(), "a.md") == (text, [])
    assert text_of(b"\0junk\n" + pdf("text"), "a")[0] == "text"


def test_what_needs_an_extra_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    message = refusal("Köln".encode("cp1252"))
    assert message.startswith("not a UTF-8 text file (byte 1 is 0xf6); pip install 'clex-local[documents]'")
    with pytest.raises(DocumentError, match=r"a PDF file; pip install 'clex-local\[documents\]'"):
        portable.read(pdf("x"), "a.pdf")


def test_what_is_too_large(tmp_path, monkeypatch):
    for module in (kinds, encodings, attachments):
        monkeypatch.setattr(module, "LARGEST", 2**20)
    assert refusal(pdf("x") + bytes(2**20), "a.pdf") == "a PDF file of more than 1 MiB; give a part of it"
    assert refusal(b"a" * (2**20 + 1), "a.txt") == "more than 1 MiB of text, no context holds that"
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name * 110_000)
    with pytest.raises(DocumentError, match="more than 1 MiB of text; name a part of it"):
        attach(str(tmp_path))


# A process of its own


def test_what_a_reader_does_ends_with_it(tmp_path, monkeypatch):
    (tmp_path / "made_up_reader.py").write_text(
        "import os, signal\n"
        "def read(data, name):\n"
        "    what = data.decode()\n"
        "    if what == 'crash': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if what == 'raise': raise RuntimeError('of the\\nlibrary')\n"
        "    if what == 'memory': return bytearray(2**40) and ('', [])\n"
        "    while what == 'time': pass\n"
        "    return 'a\\x1b[31m' + what, ['noted']\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(worker, "SECONDS", 1)
    assert worker.read_apart("made_up_reader", b"text", "f") == ("a\x1b[31mtext", ["noted"])
    cases = {"raise": r"it is damaged \(RuntimeError: of the", "memory": "takes too much memory"}
    if sys.platform != "win32":
        cases |= {"crash": "its reader ended with -11; the file is damaged", "time": "it takes too much time"}
    for data, message in cases.items():
        with pytest.raises(DocumentError, match=message):
            worker.read_apart("made_up_reader", data.encode(), "f")


# Paths


@pytest.mark.parametrize(
    ("line", "paths"),
    [
        ("a.txt", ["a.txt"]),
        ("a.txt  b.txt", ["a.txt", "b.txt"]),
        (r"My\ Report.txt", ["My Report.txt"]),
        ("'My Report.txt' \"b c\"", ["My Report.txt", "b c"]),
        ("It's there.txt", ["It's there.txt"]),
        ("with space.txt", ["with space.txt"]),
        (r"'back\slash'", [r"back\slash"]),
        ("~/a*.txt", ["~/a*.txt"]),
    ],
)
def test_paths_as_people_type_them(tmp_path, monkeypatch, line, paths):
    monkeypatch.chdir(tmp_path)
    for name in ("with space.txt", "It's there.txt"):
        Path(name).touch()
    assert typed_paths(line) == paths


def test_a_quote_that_is_not_closed():
    with pytest.raises(DocumentError, match="a quote ' is not closed"):
        typed_paths("that's it")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    assert attach("~/a.txt").documents[0].text == "at home"


# Folders and patterns


@pytest.fixture
def project(tmp_path) -> Path:
    top = tmp_path / "project"
    for name, text in {
        ".gitignore": "*.log\nbuild/\n!keep.log\n/only-top.txt\ndocs/**/*.tmp\n",
        ".hidden": "x",
        "a.py": "print()",
        "b.log": "x",
        "keep.log": "kept",
        "only-top.txt": "x",
        "build/made.py": "x",
        "src/only-top.txt": "y",
        "src/c.py": "pass",
        "src/.gitignore": "secret*\n",
        "src/secret.py": "x",
        "docs/d.md": "# D",
        "docs/deep/e.tmp": "x",
        "docs/deep/f.md": "F",
        "empty.py": "",
    }.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    (top / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return top


def test_a_folder_without_what_git_ignores(project, monkeypatch):
    attachment = attach(str(project))
    names = [document.name for document in attachment.documents]
    wanted = ["a.py", "docs/d.md", "docs/deep/f.md", "keep.log", "src/c.py", "src/only-top.txt"]
    assert names == [f"project/{name}" for name in wanted]
    assert attachment.name.endswith("(6 files)")
    assert [note.partition(": ")[2] for note in attachment.notes] == [
        "1 file is no text, and left out",
        "left out what git ignores, and what is hidden",
    ]
    assert [file.path for file in attachment.files] == [str(project / name) for name in wanted]


def test_patterns(project, monkeypatch):
    monkeypatch.chdir(project)
    assert [document.name for document in attach("**/*.py").documents] == ["a.py", "src/c.py"]
    assert [document.name for document in attach("docs/*.md").documents] == ["docs/d.md"]
    assert [document.name for document in attach(f"{project}/[a-b].py").documents] == [f"{project}/a.py"]
    with pytest.raises(DocumentError, match=r"src/\*.txt2: no file has such a name"):
        attach("src/*.txt2")
    (project / "[x].txt").write_text("a name like a pattern")
    assert attach("[x].txt").documents[0].text == "a name like a pattern"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_ignores_the_same(tmp_path):
    rules = [
        "*.o",
        "/top",
        "dir/",
        "a/b",
        "a/**/z",
        "**/any",
        "x?.txt",
        "[ab].c",
        "!q.o",
        "\\#hash",
        "#comment",
        "sp\\ ",
    ]
    names = [
        "m.o",
        "q.o",
        "top",
        "s/top",
        "dir",
        "dir/f",
        "s/dir/f",
        "a/b",
        "s/a/b",
        "a/z",
        "a/1/2/z",
        "s/any",
        "x1.txt",
    ]
    names += ["x12.txt", "a.c", "c.c", "#hash", "comment", "sp ", "s/m.o"]
    top = tmp_path / "repository"
    for name in names:
        if name != "dir":
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_text("x")
    (top / ".gitignore").write_text("\n".join(rules) + "\n")
    subprocess.run(["git", "init", "-q", str(top)], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard", "-z"], cwd=top, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    found = {path.relative_to(top).as_posix() for path in folders.files_in(top).files}
    assert found == {name for name in listed if name and not name.startswith(".")}
    # A folder in a repository has the rules of those around it.
    rules_inside = Ignored.around(top / "s")
    assert rules_inside is not None
    assert rules_inside.has(top / "s" / "m.o", False)
    assert not rules_inside.has(top / "s" / "top", False)


def test_a_pattern_with_many_stars_takes_no_time():
    stars = re.compile(glob_pattern("**/**/" + "*a" * 40 + "b"))
    assert stars.fullmatch("a" * 200) is None
    assert stars.fullmatch("x/y/" + "a" * 200 + "b")
    two = re.compile(glob_pattern("*ab*b/*.?"))
    assert [
        name for name in ("aab/x.c", "aabb/x.c", "ab/b/.c", "aabxb/.c", "abab/x.cc", "xb/x.c") if two.fullmatch(name)
    ] == [
        "aabb/x.c",
        "aabxb/.c",
    ]


@pytest.mark.parametrize("path", ["~nobody-of-this-name/a b", "x" * 5000, "x" * 5000 + "*", "[z-a]*", "a\0b"])
def test_paths_that_cannot_be(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for typed in (path, *typed_paths(path)):
        with pytest.raises(DocumentError):
            attach(typed)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes")
def test_links_in_circles_and_pipes(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "around").symlink_to(tmp_path)
    (tmp_path / "in" / "nowhere").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "in" / "pipe")
    (tmp_path / "in" / "itself").symlink_to("itself")
    assert [document.text for document in attach(str(tmp_path)).documents] == ["a"]


def test_a_folder_with_too_much_in_it(tmp_path, monkeypatch):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("x")
    monkeypatch.setattr(folders, "MOST_FILES", 10)
    with pytest.raises(DocumentError, match="more than 10 files; name a folder or a pattern in it"):
        attach(str(tmp_path))
    assert len(attach(f"{tmp_path}/[1-9].txt").documents) == 9 + 1 - 1 + 1 - 1
    monkeypatch.setattr(folders, "MOST_SEEN", 15)
    with pytest.raises(DocumentError, match="more than 15 files"):
        attach(f"{tmp_path}/1.txt*")


def test_a_folder_without_text(tmp_path):
    with pytest.raises(DocumentError, match="a folder without files"):
        attach(str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(DocumentError, match="none of its 1 files is text"):
        attach(str(tmp_path))


def test_what_is_not_there(tmp_path):
    for path, message in {
        str(tmp_path / "none"): "none: No such file or directory",
        "https://example.org/a": "an address of the web: --url fetches it",
        "a\0b": "null",
    }.items():
        with pytest.raises(DocumentError, match=message):
            attach(path)


# Names, and each file once


def test_a_file_is_sent_once(tmp_path):
    for name, text in {"a.txt": "A", "b.txt": "B", "sub/a.txt": "A"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    first = attach(str(tmp_path / "a.txt"))
    again, twice = without_twice(attach(str(tmp_path)), first.files)
    assert twice == [f"{tmp_path.name}/a.txt"]
    assert [document.text for document in again.documents] == ["B", "A"]
    (tmp_path / "a.txt").write_text("changed")
    changed, twice = without_twice(attach(str(tmp_path / "a.txt")), first.files)
    assert (changed.documents[0].text, twice) == ("changed", [])


def test_names_that_a_model_is_told(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.txt").write_text(f"{folder}\n\n")
    (tmp_path / "o\nther.txt").write_text("3")
    documents = [attach(str(tmp_path / name)).documents[0] for name in ("one/same.txt", "two/same.txt", "o\nther.txt")]
    assert texts(documents, named=True) == [
        f"File: {tmp_path}/one/same.txt\n\none",
        f"File: {tmp_path}/two/same.txt\n\ntwo",
        "File: o\\nther.txt\n\n3",
    ]
    assert texts(documents[:1], named=False) == ["one\n\n"]


# The web


@pytest.fixture
def site():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            code, kind, data, location = {
                "/page": (200, "text/html; charset=utf-8", PAGE.encode(), None),
                "/latin": (200, "text/plain; charset=iso-8859-1", "Köln".encode("latin-1"), None),
                "/pdf": (200, "application/pdf", pdf("from the web"), None),
                "/moved": (302, "", b"", "/page"),
                "/gr%C3%BC%C3%9Fe%20?%C3%B6=1": (200, "text/plain", b"found", None),
                "/away": (302, "", b"", "file:///etc/passwd"),
                "/cut": (200, "text/plain", b"a part", None),
            }.get(self.path, (404, "", b"", None))
            if self.path.startswith("/drips"):
                return self.drip(b"HTTP/1.0 200 OK\r\n" + b"\r\n" * self.path.endswith("body") + b"x: ")
            self.send_response(code)
            size = str(len(data) + 10 * (self.path == "/cut"))
            for name, value in {"Content-Type": kind, "Content-Length": size, "Location": location}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def drip(self, begin):
            with suppress(OSError):  # until nobody listens any more
                while not over.wait(0.01):
                    self.wfile.write(begin or b"x")
                    begin = b""

        def log_message(self, *_):
            pass

    over = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    over.set()
    server.shutdown()
    server.server_close()


def test_pages_of_the_web(site):
    assert attach(f"{site}/page", web=True).documents[0].text.startswith("A page\n\n## Part")
    assert attach(f"{site}/moved", web=True).documents[0].name == f"{site}/moved"
    assert attach(f"{site}/latin", web=True).documents[0].text == "Köln"
    assert attach(f"{site}/pdf", web=True).documents[0].text == "from the web"
    assert attach(f"{site}/grüße%20?ö=1#anchor", web=True).documents[0].text == "found"


@pytest.mark.parametrize("part", ["head", "body"])
def test_what_comes_byte_by_byte_has_an_end(site, monkeypatch, part):
    monkeypatch.setattr(web, "MINUTES", 0.005)
    address = f"{site}/drips/{part}"
    with pytest.raises(DocumentError, match=r"takes more than 0.005 minutes; download it, and give the file$") as error:
        fetch(address)
    assert str(error.value).startswith(f"{address}: ")


def test_what_is_too_large_is_not_fetched_to_its_end(site, monkeypatch):
    for address, largest in [(f"{site}/drips/body", 10), (f"{site}/page", 100)]:  # whose size is not said, and is
        monkeypatch.setattr(web, "LARGEST", largest)
        with pytest.raises(DocumentError, match=r"more than .*; download it, and give a part"):
            fetch(address)


def test_what_the_web_does_not_give(site):
    for address, message in {
        f"{site}/none": "the server answered 404",
        f"{site}/cut": "the connection ended after 6 of 16 bytes; try again",
        f"{site}/away": "Redirection to url 'file:///etc/passwd' is not allowed",
        "http://127.0.0.1:1/": "cannot be fetched: ",
        "http://[::1": "cannot be fetched: ",
        f"http://{'ö' * 80}.example/": "cannot be fetched: ",
        "localhost:1/page?a=1": "^https://localhost:1/page.a=1: cannot be fetched: ",
        "a.invalid/page": "^https://a.invalid/page: cannot be fetched: ",
        "file:///etc/passwd": "no address of the web",
        "page": "no address of the web",
        "/etc/passwd": "no address of the web",
    }.items():
        with pytest.raises(DocumentError, match=message):
            fetch(address)


def test_an_archive_that_is_no_document():
    data = BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.txt", "text")
    assert refusal(data.getvalue(), "a.zip").startswith("an archive, not text; unpack it")
    assert refusal(data.getvalue(), "a.docx") == "a ZIP file, not a Word document"
