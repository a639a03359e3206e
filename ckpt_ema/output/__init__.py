"""Where teachers go: finished blocks in, files that appear whole out, also where an earlier fold stopped."""
