//! Whether a packet thread runs at once when it is woken, or gives way to whoever woke it (SCHED_BATCH).
//!
//! Who brings a packet mostly goes to sleep right after. If the thread takes the CPU in the middle of those last steps, two
//! tasks are runnable there, and the kernel wakes the next one of the chain on another CPU, which in a virtual machine takes
//! tens of microseconds. Giving way made round trips a third shorter and more. Beside programs that compute, however, it means
//! waiting for the end of their time slice: so a thread looks at how long it has waited, and insists where that is long.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::sys::{micros, schedule};

/// Time slice asked of the scheduler: the shortest it grants.
const SLICE_NS: u64 = 100_000;
/// Waiting that is nothing unusual, for each time the thread runs: whoever woke it ends its work, or an
/// idle CPU is woken.
const USUAL_NS: u64 = 100_000;
/// Waiting beyond the usual that a thread puts up with: a few short programs in its way, not one that
/// computes all the time.
const PATIENCE_NS: u64 = 8_000_000;
/// One look at the kernel's account for as many wake-ups.
const EVERY: u32 = 8;
/// For how long a thread insists before it tries again: doubled with every trial that fails soon.
const FIRST_PAUSE_US: u64 = 250_000;
const LONGEST_PAUSE_US: u64 = 4_000_000;
/// For how long it insists after bulk traffic, in which the other tasks of the same stream compute, too.
const BULK_PAUSE_US: u64 = 1_000;

/// How long a thread has waited for a CPU so far, and how often it was given one (/proc/thread-self/schedstat).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waited {
    pub ns: u64,
    pub runs: u64,
}

impl Waited {
    fn parse(text: &[u8]) -> Option<Self> {
        let mut words = std::str::from_utf8(text).ok()?.split_ascii_whitespace().skip(1);
        Some(Self { ns: words.next()?.parse().ok()?, runs: words.next()?.parse().ok()? })
    }
}

/// The decisions; times in microseconds of any clock that does not go back.
pub struct Manners {
    giving_way: bool,
    seen: Waited,
    /// Waiting beyond the usual, not made up for since (nanoseconds).
    owed: u64,
    wakes: u32,
    since: u64,
    again: u64,
    pause: u64,
}

impl Default for Manners {
    fn default() -> Self {
        let seen = Waited { ns: 0, runs: 0 };
        Self { giving_way: false, seen, owed: 0, wakes: 0, since: 0, again: 0, pause: FIRST_PAUSE_US }
    }
}

impl Manners {
    /// After a wake-up: is it time for a look?
    pub fn due(&mut self, now: u64) -> bool {
        if !self.giving_way {
            return now >= self.again;
        }
        self.wakes += 1;
        self.wakes.is_multiple_of(EVERY)
    }

    /// Bulk traffic at `now`: is it to insist from now on? That says nothing about what others do.
    pub fn bulk(&mut self, now: u64) -> bool {
        self.again = self.again.max(now + BULK_PAUSE_US);
        std::mem::take(&mut self.giving_way)
    }

    /// What a look says: to give way from now on (true), to insist (false), or to go on.
    pub fn judge(&mut self, now: u64, waited: Waited) -> Option<bool> {
        let (ns, runs) = (waited.ns - self.seen.ns, waited.runs - self.seen.runs);
        self.seen = waited;
        if !self.giving_way {
            (self.giving_way, self.owed, self.wakes, self.since) = (true, 0, 0, now);
            return Some(true);
        }
        self.owed = (self.owed + ns).saturating_sub(USUAL_NS * runs);
        if self.owed < PATIENCE_NS {
            return None;
        }
        let soon = now - self.since < 4 * self.pause;
        self.pause = if soon { (2 * self.pause).min(LONGEST_PAUSE_US) } else { FIRST_PAUSE_US };
        (self.giving_way, self.again) = (false, now + self.pause);
        Some(false)
    }
}

/// The calling thread's own; where the kernel does not tell how long it waits, it insists.
pub struct Courtesy {
    stat: Option<File>,
    manners: Manners,
}

impl Courtesy {
    pub fn of_this_thread() -> Self {
        schedule(SLICE_NS, false);
        Self { stat: File::open("/proc/thread-self/schedstat").ok(), manners: Manners::default() }
    }

    /// To be called during bulk traffic.
    pub fn bulk(&mut self, now: u64) {
        if self.stat.is_some() && self.manners.bulk(now) {
            schedule(SLICE_NS, false);
        }
    }

    /// To be called when the thread has slept.
    pub fn woken(&mut self) {
        let Some(stat) = &self.stat else { return };
        let now = micros();
        if !self.manners.due(now) {
            return;
        }
        let mut text = [0; 80];
        let waited = stat.read_at(&mut text, 0).ok().and_then(|n| Waited::parse(&text[..n]));
        let verdict = match waited {
            Some(waited) => self.manners.judge(now, waited),
            None => {
                self.stat = None;
                Some(false)
            }
        };
        if let Some(giving_way) = verdict {
            schedule(SLICE_NS, giving_way);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread that is woken again and again.
    struct Life {
        now: u64,
        waited: Waited,
        manners: Manners,
        looks: u32,
    }

    impl Life {
        fn new() -> Self {
            Self { now: 5, waited: Waited { ns: 7, runs: 1 }, manners: Manners::default(), looks: 0 }
        }

        /// How many of `n` wake-ups, one every `gap` microseconds, it gave way at; each waits `idle_ns` or, giving way, `giving_ns`.
        fn go(&mut self, n: u32, gap: u64, idle_ns: u64, giving_ns: u64) -> u32 {
            let mut gave = 0;
            for _ in 0..n {
                self.now += gap;
                self.waited.runs += 1;
                self.waited.ns += if self.manners.giving_way { giving_ns } else { idle_ns };
                gave += u32::from(self.manners.giving_way);
                if self.manners.due(self.now) {
                    self.looks += 1;
                    self.manners.judge(self.now, self.waited);
                }
            }
            gave
        }
    }

    #[test]
    fn gives_way_where_nobody_computes_and_seldom_looks() {
        let mut life = Life::new();
        assert_eq!(life.go(10_000, 100, 2_000, 5_000), 9_999);
        assert_eq!(life.looks, 1 + 9_999 / EVERY);
    }

    #[test]
    fn insists_where_others_compute_and_seldom_tries_again() {
        let mut life = Life::new();
        // Two minutes of a packet every millisecond, beside a program that keeps a CPU for 4 ms.
        let gave = life.go(120_000, 1_000, 2_000, 4_000_000);
        assert!((28 * EVERY..36 * EVERY).contains(&gave), "{gave} slow packets, of 120,000");
    }

    #[test]
    fn notices_within_few_packets_that_others_begin_and_forgets_when_they_have_ended() {
        let mut life = Life::new();
        life.go(100_000, 1_000, 2_000, 5_000);
        let gave = life.go(2_000, 100, 2_000, 4_000_000);
        assert!(gave < 2 * EVERY, "{gave} slow packets");
        let gave = life.go(10_000, 1_000, 2_000, 5_000);
        assert!(gave > 9_000, "{gave}");
    }

    #[test]
    fn puts_up_with_short_programs_now_and_then() {
        let mut life = Life::new();
        for _ in 0..1_000 {
            assert_eq!(
                life.go(100, 2_000, 2_000, 10_000) + life.go(1, 2_000, 2_000, 3_000_000),
                101 - u32::from(life.now < 203_000)
            );
        }
    }

    #[test]
    fn bulk_traffic_is_no_sign_of_others() {
        let mut life = Life::new();
        life.go(100, 1_000, 2_000, 5_000);
        assert!(life.manners.bulk(life.now), "insists");
        assert!(!life.manners.bulk(life.now), "once");
        life.waited.ns += 1_000_000_000;
        assert_eq!(life.go(9, 100, 2_000, 5_000), 0, "not while more of it may come");
        assert_eq!(life.go(100, 100, 2_000, 5_000), 99);
    }

    #[test]
    fn bulk_traffic_shortens_no_pause() {
        let mut life = Life::new();
        life.go(3 * EVERY, 1_000, 2_000, 4_000_000);
        let again = life.manners.again;
        life.manners.bulk(life.now);
        assert_eq!(life.manners.again, again);
    }

    #[test]
    fn what_the_kernel_tells() {
        assert_eq!(Waited::parse(b"1234 56 78\n"), Some(Waited { ns: 56, runs: 78 }));
        for bad in [&b""[..], b"1 2", b"1 x 3\n", b"\xff 1 2"] {
            assert_eq!(Waited::parse(bad), None);
        }
        let Ok(file) = File::open("/proc/thread-self/schedstat") else { return };
        let mut text = [0; 80];
        let n = file.read_at(&mut text, 0).unwrap();
        assert!(Waited::parse(&text[..n]).unwrap().runs > 0);
    }

    /// Both ways by the real scheduler; a thread that may not is left as it was.
    #[test]
    fn a_thread_can_give_way_and_insist_again() {
        std::thread::spawn(|| {
            let mut c = Courtesy::of_this_thread();
            let policy = || -> i32 {
                let text = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
                text.rsplit(')').next().unwrap().split_ascii_whitespace().nth(38).unwrap().parse().unwrap()
            };
            assert_eq!(policy(), libc::SCHED_OTHER);
            if c.stat.is_some() {
                c.woken();
                assert_eq!(policy(), libc::SCHED_BATCH);
                c.stat = Some(File::open("/proc/version").unwrap());
                for _ in 0..EVERY {
                    c.woken();
                }
                assert_eq!(policy(), libc::SCHED_OTHER, "what cannot be read");
            }
        })
        .join()
        .unwrap();
    }
}
