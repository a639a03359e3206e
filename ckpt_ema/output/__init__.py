"""Finished blocks in, teachers that appear whole out, also where an earlier fold stopped."""
