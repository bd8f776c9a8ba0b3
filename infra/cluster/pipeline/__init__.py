"""Pipeline schedules replayed: durations, timelines, traces."""
