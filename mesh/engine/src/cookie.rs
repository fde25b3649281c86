//! mac1, mac2 and cookie replies (whitepaper 5.3, 5.4.7), and the per-source token bucket.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use zeroize::Zeroizing;

use crate::crypto::{hash, mac16, mac16_matches, random, xchacha_open, xchacha_seal, Forged, Key};
use crate::noise::TYPE_COOKIE;

pub const COOKIE_REPLY_LEN: usize = 64;
const COOKIE_LIFE_MS: u64 = 120_000;
/// A sender stops using a cookie this long before the receiver may have forgotten its secret.
const COOKIE_SAFETY_MS: u64 = 5_000;

/// The key of mac1 in messages to `public`.
pub fn mac1_key(public: &Key) -> Key {
    hash(&[b"mac1----", public])
}

fn cookie_key(public: &Key) -> Key {
    hash(&[b"cookie--", public])
}

fn source_bytes(src: &SocketAddr) -> ([u8; 18], usize) {
    let mut b = [0u8; 18];
    let n = match src.ip() {
        IpAddr::V4(a) => {
            b[..4].copy_from_slice(&a.octets());
            4
        }
        IpAddr::V6(a) => {
            b[..16].copy_from_slice(&a.octets());
            16
        }
    };
    b[n..n + 2].copy_from_slice(&src.port().to_be_bytes());
    (b, n + 2)
}

/// Checks mac1, the 16 bytes before the last 16 of a handshake message.
pub fn mac1_ok(key: &Key, msg: &[u8]) -> bool {
    let at = msg.len() - 32;
    mac16_matches(key, &[&msg[..at]], &msg[at..at + 16])
}

/// The receiving side: checks macs of handshake messages sent to `public`.
pub struct Checker {
    mac1_key: Key,
    cookie_key: Key,
    pub(crate) secret: Zeroizing<Key>,
    pub(crate) secret_born: Option<u64>,
}

impl Checker {
    pub fn new(public: &Key) -> Self {
        Self {
            mac1_key: mac1_key(public),
            cookie_key: cookie_key(public),
            secret: Zeroizing::new([0; 32]),
            secret_born: None,
        }
    }

    pub fn mac1_ok(&self, msg: &[u8]) -> bool {
        mac1_ok(&self.mac1_key, msg)
    }

    fn cookie(&self, src: &SocketAddr) -> [u8; 16] {
        let (b, n) = source_bytes(src);
        mac16(&self.secret[..], &[&b[..n]])
    }

    /// Checks mac2 against the cookie of this source.
    pub fn mac2_ok(&self, now: u64, msg: &[u8], src: &SocketAddr) -> bool {
        match self.secret_born {
            Some(born) if now - born <= COOKIE_LIFE_MS => {
                let at = msg.len() - 16;
                mac16_matches(&self.cookie(src), &[&msg[..at]], &msg[at..])
            }
            _ => false,
        }
    }

    /// A cookie reply to a message whose mac1 was valid.
    pub fn reply(&mut self, now: u64, msg: &[u8], src: &SocketAddr) -> [u8; COOKIE_REPLY_LEN] {
        if self.secret_born.is_none_or(|born| now - born > COOKIE_LIFE_MS) {
            random(&mut self.secret[..]);
            self.secret_born = Some(now);
        }
        let mut out = [0u8; COOKIE_REPLY_LEN];
        out[0] = TYPE_COOKIE;
        out[4..8].copy_from_slice(&msg[4..8]);
        let mut nonce = [0u8; 24];
        random(&mut nonce);
        out[8..32].copy_from_slice(&nonce);
        let mac1 = &msg[msg.len() - 32..msg.len() - 16];
        xchacha_seal(&self.cookie_key, &nonce, mac1, &self.cookie(src), &mut out[32..]);
        out
    }
}

/// The sending side, one per peer. Small: most peers never see a cookie.
#[derive(Default)]
pub struct Sender {
    pub(crate) last_mac1: Option<[u8; 16]>,
    pub(crate) cookie: Option<Box<(u64, [u8; 16])>>,
}

impl Sender {
    /// Fills mac1 and, with a fresh cookie, mac2 of a message to `peer`.
    pub fn add_macs(&mut self, now: u64, peer: &Key, msg: &mut [u8]) {
        let at = msg.len() - 32;
        let m1 = mac16(&mac1_key(peer), &[&msg[..at]]);
        msg[at..at + 16].copy_from_slice(&m1);
        self.last_mac1 = Some(m1);
        if let Some(c) = &self.cookie {
            if now - c.0 < COOKIE_LIFE_MS - COOKIE_SAFETY_MS {
                let m2 = mac16(&c.1, &[&msg[..at + 16]]);
                msg[at + 16..].copy_from_slice(&m2);
            }
        }
    }

    /// Takes a cookie reply from `peer` that answers our last message.
    pub fn read_reply(&mut self, now: u64, peer: &Key, msg: &[u8; COOKIE_REPLY_LEN]) -> Result<(), Forged> {
        let mac1 = self.last_mac1.ok_or(Forged)?;
        let nonce: [u8; 24] = msg[8..32].try_into().expect("fixed length");
        let mut data: [u8; 32] = msg[32..].try_into().expect("fixed length");
        xchacha_open(&cookie_key(peer), &nonce, &mac1, &mut data)?;
        self.last_mac1 = None;
        self.cookie = Some(Box::new((now, data[..16].try_into().expect("fixed length"))));
        Ok(())
    }
}

/// Token bucket per source address (IPv4 /32, IPv6 /64), consulted only under load.
#[derive(Default)]
pub struct RateLimiter {
    buckets: HashMap<u64, (u64, u64)>,
    swept: u64,
}

const PACKETS_PER_SECOND: u64 = 20;
const BURST: u64 = 5;
const COST_MS: u64 = 1000 / PACKETS_PER_SECOND;
const MAX_SOURCES: usize = 16_384;

impl RateLimiter {
    /// Whether a handshake message from `ip` may be worked on at `now` (milliseconds).
    pub fn allow(&mut self, now: u64, ip: IpAddr) -> bool {
        let key = match ip {
            IpAddr::V4(a) => u64::from(u32::from(a)),
            IpAddr::V6(a) => (u128::from(a) >> 64) as u64 | 1 << 63,
        };
        if now - self.swept > 1000 {
            self.swept = now;
            self.buckets.retain(|_, b| now - b.0 < 1000);
        }
        let full = COST_MS * BURST;
        if self.buckets.len() >= MAX_SOURCES && !self.buckets.contains_key(&key) {
            return false;
        }
        let b = self.buckets.entry(key).or_insert((now, full));
        b.1 = (b.1 + (now - b.0)).min(full);
        b.0 = now;
        if b.1 >= COST_MS {
            b.1 -= COST_MS;
            true
        } else {
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::SecretKey;
    use crate::noise::INITIATION_LEN;

    #[test]
    fn cookie_exchange_binds_address_and_port() {
        let public = SecretKey::random().public();
        let mut checker = Checker::new(&public);
        let mut sender = Sender::default();
        let src: SocketAddr = "192.0.2.1:5000".parse().unwrap();
        let mut msg = [9u8; INITIATION_LEN];
        sender.add_macs(1000, &public, &mut msg);
        assert!(checker.mac1_ok(&msg));
        assert!(!checker.mac2_ok(1000, &msg, &src));
        let reply = checker.reply(1000, &msg, &src);
        let mut forged = reply;
        forged[40] ^= 1;
        assert!(sender.read_reply(1001, &public, &forged).is_err());
        sender.read_reply(1001, &public, &reply).unwrap();
        assert!(sender.read_reply(1001, &public, &reply).is_err(), "one reply per message");
        sender.add_macs(1002, &public, &mut msg);
        assert!(checker.mac2_ok(1003, &msg, &src));
        assert!(!checker.mac2_ok(1003, &msg, &"192.0.2.1:5001".parse().unwrap()));
        assert!(!checker.mac2_ok(1003, &msg, &"192.0.2.2:5000".parse().unwrap()));
        assert!(!checker.mac2_ok(122_000, &msg, &src), "the secret expires");
        msg[20] ^= 1;
        assert!(!checker.mac1_ok(&msg));
        msg[INITIATION_LEN - 16..].fill(9);
        sender.add_macs(1002 + COOKIE_LIFE_MS, &public, &mut msg);
        assert_eq!(msg[INITIATION_LEN - 16..], [9; 16], "an old cookie is not used");
    }

    #[test]
    fn limiter_lets_the_burst_through_then_the_rate() {
        let mut l = RateLimiter::default();
        let a: IpAddr = "192.0.2.1".parse().unwrap();
        let passed = (0..20).filter(|_| l.allow(10_000, a)).count();
        assert_eq!(passed, BURST as usize);
        assert!(l.allow(10_000, "192.0.2.2".parse().unwrap()), "others are not affected");
        assert!(!l.allow(10_020, a));
        assert!(l.allow(10_050, a));
        let v6 = |s: &str| s.parse::<IpAddr>().unwrap();
        let passed = (0..20).filter(|i| l.allow(10_050, v6(&format!("2001:db8::{i}")))).count();
        assert_eq!(passed, BURST as usize, "one /64 is one source");
        assert!(l.allow(10_050, v6("2001:db8:0:1::1")));
    }
}
