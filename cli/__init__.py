"""The command line: parse, call the library, print. stdout is the result, stderr logs and progress."""
