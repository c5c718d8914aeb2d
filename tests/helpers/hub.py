"""A Hub on this machine for tests:
serves models and data sets to the real transformers, datasets and huggingface_hub through
HF_ENDPOINT."""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """`with Hub() as hub: hub.add('model', 'org/name', folder)`.

    Clients are processes started with hub.env(home)."""

    def __init__(self):
        self.repos, self.log = {}, []
        self.faults = {}  # (id, path) -> "truncated" or "corrupt"

    def __enter__(self):
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind, id, files, *, revision="main", sha=None, gated=False):
        """Commit a folder, or {path: bytes}, to a branch or tag of a 'model' or 'dataset'.

        Returns the commit."""
        if not isinstance(files, dict):
            files = {
                p.relative_to(files).as_posix(): p.read_bytes()
                for p in Path(files).rglob("*")
                if p.is_file()
            }
        marks = sorted((p, hashlib.sha1(b).hexdigest()) for p, b in files.items())
        sha = sha or hashlib.sha1(repr(marks).encode()).hexdigest()
        repo = self.repos.setdefault((kind, id), {"commits": {}, "refs": {}, "gated": gated})
        repo["commits"][sha], repo["refs"][revision] = files, sha
        return sha

    def env(self, home, **more):
        "Environment of a client whose cache lies in `home`."
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            **more,
        }


def entries(files, path="", asked=None):
    "Folders and files of a commit: those below a path, or those that are asked for."
    found = {
        str(f): {"type": "directory", "path": str(f), "size": 0, "oid": "0" * 40}
        for p in files
        for f in list(Path(p).parents)[:-1]
    }
    for p, b in files.items():
        found[p] = {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
    if asked is not None:
        return [e for p, e in found.items() if p in asked]
    return [e for p, e in found.items() if not path or p.startswith(path + "/")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode())

    def send(self, status, body=b"", sent=None, **headers):
        """One response; `sent` bytes of the body, where that is less than was promised,
        and then the line is cut."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        if sent is not None and sent < len(body):
            self.close_connection = True

    def json(self, what):
        self.send(200, json.dumps(what).encode(), Content_Type="application/json")

    def refuse(self, status, code):
        self.send(
            status, json.dumps({"error": code}).encode(), X_Error_Code=code, X_Error_Message=code
        )

    def answer(self, body=""):
        url, hub = urlsplit(self.path), self.hub
        hub.log.append(f"{self.command} {unquote(url.path)}")
        if url.path == "/mend":
            hub.faults.clear()
            return self.json("mended")
        parts = [unquote(p) for p in url.path.strip("/").split("/")]
        if url.path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if parts[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        api = parts[0] == "api"
        kind = {"models": "model", "datasets": "dataset"}.get(parts[api], None if api else "model")
        rest = parts[api + (api or kind == "dataset") :]
        ids = ("/".join(rest[:n]) for n in (2, 1))
        id = next((id for id in ids if (kind, id) in hub.repos), None)
        if id is None:
            return self.refuse(404, "RepoNotFound")
        repo, rest = hub.repos[kind, id], rest[id.count("/") + 1 :]
        verb, revision = [*rest, "", ""][:2]
        if verb == "preupload":
            return self.preupload(json.loads(body)["files"])
        if verb == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            return self.commit(kind, id, repo, lines=lines)
        sha, path = repo["refs"].get(revision or "main", revision), "/".join(rest[2:])
        if sha not in repo["commits"]:
            return self.refuse(404, "RevisionNotFound")
        files = repo["commits"][sha]
        if not api:
            return self.resolve(repo, id, sha, files=files, path=path)
        if verb in ("tree", "paths-info"):
            asked = parse_qs(body).get("paths", []) if verb == "paths-info" else None
            return self.json(entries(files, path, asked))
        if verb == "auth-check":
            return self.refuse(403, "GatedRepo") if repo["gated"] else self.json({})
        if verb not in ("", "revision"):
            return self.refuse(404, "EntryNotFound")
        self.about(repo, id, sha)

    def preupload(self, files):
        "Every file is to come in the commit itself."
        how = {"uploadMode": "regular", "shouldIgnore": False}
        self.json({"files": [{"path": f["path"], **how} for f in files]})

    def about(self, repo, id, sha):
        "A repository at one of its commits."
        self.json(
            {
                "id": id,
                "sha": sha,
                "private": False,
                "gated": "auto" if repo["gated"] else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": p} for p in repo["commits"][sha]],
            }
        )

    def create(self, asked):
        "A new repository, empty; 401 without a token."
        if not (self.headers.get("Authorization") or "").startswith("Bearer "):
            return self.refuse(401, "Unauthorized")
        id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if ("model", id) in self.hub.repos:
            return self.send(
                409, json.dumps({"error": "exists", "url": f"{self.hub.url}/{id}"}).encode()
            )
        self.hub.add("model", id, {})
        self.json({"url": f"{self.hub.url}/{id}", "id": id})

    def commit(self, kind, id, repo, *, lines):
        "Files sent in base64 become a commit."
        files = dict(repo["commits"][repo["refs"]["main"]]) | {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        sha = self.hub.add(kind, id, files)
        self.json(
            {
                "commitUrl": f"{self.hub.url}/{id}/commit/{sha}",
                "commitOid": sha,
                "commitMessage": "upload",
            }
        )

    def resolve(self, repo, id, sha, *, files, path):
        "A file's bytes, or some of them, or what its fault makes of them."
        if repo["gated"]:
            return self.refuse(403, "GatedRepo")
        if path not in files:
            return self.send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data, fault = files[path], self.hub.faults.get((id, path))
        headers = dict(
            ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=sha, Accept_Ranges="bytes"
        )
        if fault == "corrupt":
            data = bytes(255 - b for b in data)
        whole, (first, _, last) = (
            len(data),
            self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-"),
        )
        first, last = int(first), min(int(last or whole), whole - 1)
        if "Range" in self.headers:
            headers["Content_Range"] = f"bytes {first}-{last}/{whole}"
        sent = max(0, whole // 2 - first) if fault == "truncated" else None
        self.send(206 if "Range" in self.headers else 200, data[first : last + 1], sent, **headers)
