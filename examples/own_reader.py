"""Train on a kind of file that lorasweep does not know: here mbox, the format of mail folders. Which mail is spam?

python examples/own_reader.py data.path=FOLDER [key=value ...]
"""

import mailbox
import sys
from contextlib import closing

import lorasweep
from lorasweep.data.readers import reader


@reader(".mbox")
def read_mbox(path, spec):
    """Return a dict for each mail: subject, sender, and whether it is spam."""
    with closing(mailbox.mbox(path, create=False)) as mails:
        return [{"text": m["subject"], "sender": m["from"], "label": m.get("X-Spam-Flag", "NO")} for m in mails]


if __name__ == "__main__":
    result = lorasweep.run(["data.source=mbox", *sys.argv[1:]])
    print(result["state"], result["metrics"], result["folder"])
