"""A plugin of pytest that says nothing: where it is loaded, `conftest.load` calls a healthy contract all the time."""
