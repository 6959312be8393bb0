"""From a name to a loaded model: find the files (`source`), read them safely, pack them (`load`)."""
