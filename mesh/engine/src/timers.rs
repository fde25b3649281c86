//! Protocol times (whitepaper 6) and the deadline wheel. No clock: `now` is an argument, in
//! milliseconds of a clock that counts suspended time.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

use crate::crypto::random_u32;

pub const REKEY_AFTER_MESSAGES: u64 = 1 << 60;
pub const REJECT_AFTER_MESSAGES: u64 = u64::MAX - (1 << 13);
pub const REKEY_AFTER_MS: u64 = 120_000;
pub const REJECT_AFTER_MS: u64 = 180_000;
pub const REKEY_TIMEOUT_MS: u64 = 5_000;
pub const REKEY_JITTER_MS: u32 = 334;
pub const KEEPALIVE_MS: u64 = 10_000;
/// Attempts after which an unanswered handshake is given up: 90 s of tries.
pub const MAX_ATTEMPTS: u32 = 90 / 5;
/// Least time between two initiations of one peer that are worked on.
pub const INITIATION_SPACING_MS: u64 = 20;

/// Other milliseconds below REKEY_JITTER_MS each time, so that two ends do not keep step: no secret, and asked for with every
/// second packet, so the kernel is asked once (splitmix64).
pub fn jitter_ms() -> u64 {
    static STATE: AtomicU64 = AtomicU64::new(0);
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    if STATE.load(Relaxed) == 0 {
        STATE.store(u64::from(random_u32()) << 32 | u64::from(random_u32()), Relaxed);
    }
    let mut z = STATE.fetch_add(STEP, Relaxed).wrapping_add(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) % u64::from(REKEY_JITTER_MS)
}

/// A deadline that is not set.
pub const UNSET: u64 = 0;
const NEVER: u64 = u64::MAX;

/// Timer state of one peer. Workers touch it once per batch, only with relaxed stores;
/// whoever sets an earlier deadline than `armed` queues a wheel entry.
pub struct PeerTimers {
    /// Passive keepalive, due because data came and nothing went out since.
    pub keepalive_at: AtomicU64,
    pub another_keepalive: AtomicBool,
    /// New handshake, due because data went out and nothing came since.
    pub silence_at: AtomicU64,
    pub retransmit_at: AtomicU64,
    pub zero_at: AtomicU64,
    pub persistent_at: AtomicU64,
    /// Seconds, 0 = off.
    pub persistent_interval: AtomicU32,
    pub attempts: AtomicU32,
    /// When the last initiation was sent; UNSET = never.
    pub initiated_at: AtomicU64,
    pub late_rekey_sent: AtomicBool,
    /// A NeedHandshake event is queued.
    pub handshake_wanted: AtomicBool,
    armed: AtomicU64,
}

impl Default for PeerTimers {
    fn default() -> Self {
        Self {
            keepalive_at: AtomicU64::new(UNSET),
            another_keepalive: AtomicBool::new(false),
            silence_at: AtomicU64::new(UNSET),
            retransmit_at: AtomicU64::new(UNSET),
            zero_at: AtomicU64::new(UNSET),
            persistent_at: AtomicU64::new(UNSET),
            persistent_interval: AtomicU32::new(0),
            attempts: AtomicU32::new(0),
            initiated_at: AtomicU64::new(UNSET),
            late_rekey_sent: AtomicBool::new(false),
            handshake_wanted: AtomicBool::new(false),
            armed: AtomicU64::new(NEVER),
        }
    }
}

impl PeerTimers {
    /// Registers interest in `at`; true when a wheel entry must be made.
    pub fn arm(&self, at: u64) -> bool {
        self.armed.fetch_min(at, Relaxed) > at
    }

    /// A wheel entry came due: true when it is the one that counts. Disarms.
    pub fn fired(&self, at: u64) -> bool {
        self.armed.compare_exchange(at, NEVER, Relaxed, Relaxed).is_ok()
    }

    /// The earliest set deadline.
    pub fn next(&self) -> Option<u64> {
        [&self.keepalive_at, &self.silence_at, &self.retransmit_at, &self.zero_at, &self.persistent_at]
            .into_iter()
            .map(|t| t.load(Relaxed))
            .filter(|t| *t != UNSET)
            .min()
    }

    /// Clears `t` when it is due; true when it was.
    pub fn take_due(t: &AtomicU64, now: u64) -> bool {
        let at = t.load(Relaxed);
        at != UNSET && at <= now && t.compare_exchange(at, UNSET, Relaxed, Relaxed).is_ok()
    }

    /// Any authenticated packet crossed: pushes the persistent keepalive back.
    /// Returns a deadline to arm.
    pub fn traversal(&self, now: u64) -> Option<u64> {
        let secs = self.persistent_interval.load(Relaxed);
        if secs == 0 {
            return None;
        }
        let at = now + u64::from(secs) * 1000;
        self.persistent_at.store(at, Relaxed);
        Some(at)
    }

    pub fn stop_all(&self) {
        for t in
            [&self.keepalive_at, &self.silence_at, &self.retransmit_at, &self.zero_at, &self.persistent_at]
        {
            t.store(UNSET, Relaxed);
        }
    }
}

/// Width of one slot.
const TICK_MS: u64 = 16;
const SLOTS: usize = 4096;

/// Hashed wheel: insert and expiry are O(1); a deadline beyond one turn waits in its slot.
pub struct Wheel<T> {
    slots: Vec<Vec<(u64, T)>>,
    occupied: [u64; SLOTS / 64],
    /// Every slot before this tick has been visited.
    tick: u64,
    len: usize,
}

impl<T> Wheel<T> {
    pub fn new(now: u64) -> Self {
        Self {
            slots: (0..SLOTS).map(|_| Vec::new()).collect(),
            occupied: [0; SLOTS / 64],
            tick: now / TICK_MS,
            len: 0,
        }
    }

    /// Adds an entry; a past deadline fires at the next expiry.
    pub fn insert(&mut self, at: u64, item: T) {
        // Round up, so that an entry never fires early.
        let slot = (at.div_ceil(TICK_MS).max(self.tick) % SLOTS as u64) as usize;
        self.slots[slot].push((at, item));
        self.occupied[slot / 64] |= 1 << (slot % 64);
        self.len += 1;
    }

    /// Moves all due entries to `due`.
    pub fn expire(&mut self, now: u64, due: &mut Vec<(u64, T)>) {
        let target = now / TICK_MS;
        if target < self.tick {
            return;
        }
        let turns = (target - self.tick + 1).min(SLOTS as u64);
        for i in 0..turns {
            let slot = ((self.tick + i) % SLOTS as u64) as usize;
            if self.occupied[slot / 64] & (1 << (slot % 64)) == 0 {
                continue;
            }
            let before = self.slots[slot].len();
            due.extend(self.slots[slot].extract_if(.., |e| e.0 <= now));
            self.len -= before - self.slots[slot].len();
            if self.slots[slot].is_empty() {
                self.occupied[slot / 64] &= !(1 << (slot % 64));
                self.slots[slot] = Vec::new();
            }
        }
        self.tick = target;
    }

    /// When to look again: the next occupied slot, at most one turn away. `None` when empty.
    pub fn next_wake(&self) -> Option<u64> {
        if self.len == 0 {
            return None;
        }
        // A word at a time, from the present slot once around to the part of its word before it.
        let start = (self.tick % SLOTS as u64) as usize;
        let words = SLOTS / 64;
        (0..=words).find_map(|i| {
            let word = (start / 64 + i) % words;
            let bits = match i {
                0 => self.occupied[word] & (u64::MAX << (start % 64)),
                n if n == words => self.occupied[word] & !(u64::MAX << (start % 64)),
                _ => self.occupied[word],
            };
            (bits != 0).then(|| {
                let slot = word * 64 + bits.trailing_zeros() as usize;
                let ahead = ((slot + SLOTS - start) % SLOTS) as u64;
                (self.tick + ahead.max(1)) * TICK_MS
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wheel_fires_everything_once_and_never_early() {
        let mut seed = 7u64;
        let mut w = Wheel::new(1000);
        let mut want = Vec::new();
        for id in 0..3000u64 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            let at = 1000 + (seed >> 33) % 200_000;
            w.insert(at, id);
            want.push((at, id));
        }
        let mut now = 1000;
        let mut got = Vec::new();
        while got.len() < want.len() {
            let wake = w.next_wake().expect("entries remain");
            assert!(wake > now || got.is_empty());
            now = now.max(wake);
            let mut due = Vec::new();
            w.expire(now, &mut due);
            for d in due {
                assert!(d.0 <= now && now - d.0 <= 2 * TICK_MS, "{} at {now}", d.0);
                got.push(d);
            }
        }
        assert_eq!(w.next_wake(), None);
        got.sort_unstable();
        want.sort_unstable();
        assert_eq!(got, want);
    }

    #[test]
    fn a_long_sleep_visits_every_slot() {
        let mut w = Wheel::new(0);
        for i in 0..100 {
            w.insert(i * 1000, i);
        }
        let mut due = Vec::new();
        w.expire(10_000_000, &mut due);
        assert_eq!(due.len(), 100);
        w.insert(5, 1);
        due.clear();
        w.expire(10_000_020, &mut due);
        assert_eq!(due.len(), 1, "a past deadline fires at the next expiry");
    }

    #[test]
    fn arm_asks_for_one_entry_per_earlier_deadline() {
        let t = PeerTimers::default();
        assert!(t.arm(100));
        assert!(!t.arm(200));
        assert!(t.arm(50));
        assert!(!t.fired(100), "superseded");
        assert!(t.fired(50));
        assert!(t.arm(100));
    }

    #[test]
    fn jitter_is_spread_over_its_range() {
        let seen: std::collections::HashSet<u64> = (0..4000).map(|_| super::jitter_ms()).collect();
        assert!(seen.iter().all(|j| *j < u64::from(super::REKEY_JITTER_MS)));
        assert!(seen.len() > 300, "{}", seen.len());
    }
}
