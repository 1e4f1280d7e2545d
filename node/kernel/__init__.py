"""What every part of Headrace shares: errors, limits, time, types and ports. Imports nothing of ours."""
