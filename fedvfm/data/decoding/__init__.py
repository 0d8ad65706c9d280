"""Files of strangers are decoded in a child process with limits; what it answers is checked and never unpickled."""
