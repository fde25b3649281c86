//! Which TAI64N stamps of a peer's initiations are new (whitepaper 5.1), also after a clock went wrong.
//!
//! One mark alone lets a peer lock itself out: an initiation sent while its clock was years ahead
//! would refuse all it sends once the clock is right again (CVE-2021-46873). So stamps ahead of our
//! own clock have a mark of their own, and each stamp is still accepted only once.

use crate::noise::{tai64n, Timestamp};

/// How far ahead of our clock a stamp may be and count as present, in seconds. A peer whose clock
/// steps back by less waits at most that long.
const AHEAD_SECS: u64 = 30;

#[derive(Debug, Clone, Copy, Default)]
pub struct Stamps {
    /// Greatest accepted stamp not ahead of our clock.
    pub(crate) present: Timestamp,
    /// Greatest accepted stamp ahead of it; zero when there is none.
    pub(crate) ahead: Timestamp,
}

fn horizon(wall_secs: u64) -> Timestamp {
    tai64n(wall_secs.saturating_add(AHEAD_SECS), 0)
}

impl Stamps {
    /// Moves the marks with our own clock, which may have been set either way.
    fn settle(&mut self, limit: &Timestamp) {
        if self.present > *limit {
            self.ahead = self.ahead.max(self.present);
            self.present = Timestamp::default();
        }
        if self.ahead <= *limit {
            self.present = self.present.max(self.ahead);
            self.ahead = Timestamp::default();
        }
    }

    /// Whether `stamp` is new when our clock shows `wall_secs`.
    pub fn fresh(&mut self, stamp: &Timestamp, wall_secs: u64) -> bool {
        let limit = horizon(wall_secs);
        self.settle(&limit);
        *stamp > if *stamp > limit { self.ahead } else { self.present }
    }

    /// Remembers an accepted stamp.
    pub fn record(&mut self, stamp: &Timestamp, wall_secs: u64) {
        if *stamp > horizon(wall_secs) {
            self.ahead = *stamp;
        } else {
            self.present = *stamp;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(s: &mut Stamps, secs: u64, now: u64) -> bool {
        let t = tai64n(secs, 0);
        let ok = s.fresh(&t, now);
        if ok {
            s.record(&t, now);
        }
        ok
    }

    const NOW: u64 = 1_700_000_000;
    const YEARS: u64 = 10 * 365 * 86_400;

    #[test]
    fn a_stamp_is_taken_once_and_never_an_older_one() {
        let mut s = Stamps::default();
        assert!(take(&mut s, NOW, NOW));
        assert!(!take(&mut s, NOW, NOW));
        assert!(!take(&mut s, NOW - 1, NOW));
        assert!(take(&mut s, NOW + 1, NOW));
    }

    #[test]
    fn ten_years_ahead_once_locks_nobody_out_and_is_no_ticket_for_replays() {
        let mut s = Stamps::default();
        assert!(take(&mut s, NOW, NOW));
        assert!(take(&mut s, NOW + YEARS, NOW + 1));
        assert!(!take(&mut s, NOW + YEARS, NOW + 2), "a replay of it");
        assert!(take(&mut s, NOW + 3, NOW + 3), "the clock is right again");
        assert!(!take(&mut s, NOW, NOW + 4));
        assert!(!take(&mut s, NOW + YEARS, NOW + 5));
        assert!(!take(&mut s, NOW + YEARS, NOW + YEARS + 9), "also in ten years");
        assert!(take(&mut s, NOW + YEARS + 9, NOW + YEARS + 9));
    }

    #[test]
    fn our_own_wrong_clock_locks_nobody_out() {
        let mut s = Stamps::default();
        assert!(take(&mut s, NOW, 0), "ours starts at the epoch");
        assert!(!take(&mut s, NOW, 0));
        assert!(!take(&mut s, NOW, NOW), "and is set later");
        assert!(take(&mut s, NOW + 1, NOW + 1));
        // Both clocks ahead, then both right.
        assert!(take(&mut s, NOW + YEARS, NOW + YEARS));
        assert!(take(&mut s, NOW + 2, NOW + 2));
        assert!(!take(&mut s, NOW + YEARS, NOW + 3));
    }

    #[test]
    fn a_peer_always_ahead_is_only_in_order() {
        let mut s = Stamps::default();
        for i in 0..10 {
            assert!(take(&mut s, NOW + 3600 + i, NOW + i));
            assert!(!take(&mut s, NOW + 3600 + i, NOW + i));
        }
    }
}
