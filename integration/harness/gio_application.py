"""A Gio.Application, for Debian's Python with python3-gi: the first start serves, another one activates the first."""

import sys

from gi.repository import Gio

app = Gio.Application(application_id=sys.argv[1], flags=Gio.ApplicationFlags.FLAGS_NONE)
app.connect("activate", lambda _app: print("activated", flush=True))
app.register(None)
print("remote" if app.get_is_remote() else "primary", flush=True)
if not app.get_is_remote():
    app.hold()
sys.exit(app.run([]))
