"""Private messages between coordinator and trainer."""
