"""From a name to a loaded model: find the files (`hub`), read them safely (`formats`), pack them (`load`)."""
