"""An engine rank's side of an update, from connecting to installing."""
