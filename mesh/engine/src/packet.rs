//! Bounds-checked view of inner IP packets, and the internet checksum.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;

/// What the tunnel must know of an inner packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inner {
    pub src: IpAddr,
    pub dst: IpAddr,
    /// Bytes of the packet itself: what follows is padding.
    pub len: usize,
}

pub fn be16(b: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([b[at], b[at + 1]])
}

pub fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn v6_at(b: &[u8], at: usize) -> Ipv6Addr {
    let octets: [u8; 16] = b[at..at + 16].try_into().expect("16 bytes");
    octets.into()
}

/// Addresses and true length of an IPv4 or IPv6 packet, or `None` when it is not one.
#[inline]
pub fn parse(b: &[u8]) -> Option<Inner> {
    match b.first()? >> 4 {
        4 if b.len() >= 20 => {
            let header = usize::from(b[0] & 15) * 4;
            let len = usize::from(be16(b, 2));
            if header < 20 || len < header || len > b.len() {
                return None;
            }
            let src = Ipv4Addr::new(b[12], b[13], b[14], b[15]);
            let dst = Ipv4Addr::new(b[16], b[17], b[18], b[19]);
            Some(Inner { src: src.into(), dst: dst.into(), len })
        }
        6 if b.len() >= 40 => {
            let len = 40 + usize::from(be16(b, 4));
            (len <= b.len()).then(|| Inner { src: v6_at(b, 8).into(), dst: v6_at(b, 24).into(), len })
        }
        _ => None,
    }
}

/// Where the transport header of a plain (unfragmented, no extension header) packet starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transport {
    pub v6: bool,
    pub proto: u8,
    /// Length of the IP header.
    pub ip_len: usize,
    /// Length of IP and transport headers together.
    pub header_len: usize,
}

/// TCP or UDP packets that offloads can handle; `b` is exactly one valid packet (see [`parse`]).
pub fn transport(b: &[u8]) -> Option<Transport> {
    let (v6, proto, ip_len) = if b[0] >> 4 == 6 {
        (true, b[6], 40)
    } else {
        // More-fragments or an offset: not a whole transport packet. Options: leave alone.
        if b[0] != 0x45 || be16(b, 6) & 0x3fff != 0 {
            return None;
        }
        (false, b[9], 20)
    };
    let l4 = b.get(ip_len..)?;
    let l4_len = match proto {
        TCP if l4.len() >= 20 => usize::from(l4[12] >> 4) * 4,
        UDP if l4.len() >= 8 => 8,
        _ => return None,
    };
    (l4_len >= 8 && (proto == UDP || l4_len >= 20) && l4_len <= l4.len()).then_some(Transport {
        v6,
        proto,
        ip_len,
        header_len: ip_len + l4_len,
    })
}

#[inline(always)]
fn sum_words(data: &[u8]) -> u64 {
    let mut lanes = [0u64; 16];
    let mut blocks = data.chunks_exact(64);
    for block in &mut blocks {
        for (lane, w) in lanes.iter_mut().zip(block.chunks_exact(4)) {
            *lane += u64::from(u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
        }
    }
    let mut total: u64 = lanes.iter().sum();
    let mut words = blocks.remainder().chunks_exact(4);
    for w in &mut words {
        total += u64::from(u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
    }
    let mut last = [0u8; 4];
    let rest = words.remainder();
    last[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_ne_bytes(last))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_words_avx2(data: &[u8]) -> u64 {
    sum_words(data)
}

/// Unfolded ones-complement sum of `data` in native byte order; sums of even-length parts add up.
#[inline]
pub fn sum(data: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if data.len() >= 128 && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2, just checked.
        return unsafe { sum_words_avx2(data) };
    }
    sum_words(data)
}

/// Folds an unfolded sum to 16 bits.
pub fn fold(mut s: u64) -> u16 {
    s = (s >> 32) + (s & 0xffff_ffff);
    s = (s >> 32) + (s & 0xffff_ffff);
    s = (s >> 16) + (s & 0xffff);
    s = (s >> 16) + (s & 0xffff);
    s = (s >> 16) + (s & 0xffff);
    s as u16
}

/// Writes a folded native-order sum where a checksum field is.
pub fn put_sum(b: &mut [u8], at: usize, value: u16) {
    b[at..at + 2].copy_from_slice(&value.to_ne_bytes());
}

/// Sum of the pseudo header of packet `b` for a transport part of `l4_len` bytes.
pub fn pseudo_sum(b: &[u8], v6: bool, proto: u8, l4_len: usize) -> u64 {
    let addresses = if v6 { &b[8..40] } else { &b[12..20] };
    let l4_len = l4_len as u32;
    sum(addresses)
        + u64::from(u32::from_ne_bytes(l4_len.to_be_bytes()))
        + u64::from(u32::from_ne_bytes(u32::from(proto).to_be_bytes()))
}

/// Recomputes the header checksum of the IPv4 packet at the start of `b`.
pub fn fix_ipv4_header(b: &mut [u8]) {
    let header = usize::from(b[0] & 15) * 4;
    b[10..12].fill(0);
    let s = !fold(sum(&b[..header]));
    put_sum(b, 10, s);
}

/// Whether the transport checksum of a whole packet is right.
pub fn transport_sum_ok(b: &[u8], t: &Transport) -> bool {
    let l4 = &b[t.ip_len..];
    if t.proto == UDP && l4[6..8] == [0, 0] {
        return false;
    }
    fold(pseudo_sum(b, t.v6, t.proto, l4.len()) + sum(l4)) == 0xffff
}

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod build {
    //! Packets for the tests of this crate.
    use super::*;

    /// A TCP or UDP packet with right checksums. `flags` is ignored for UDP.
    pub fn l4(src: IpAddr, dst: IpAddr, proto: u8, seq: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut b = match (src, dst) {
            (IpAddr::V4(s), IpAddr::V4(d)) => {
                let mut b = vec![0u8; 20];
                (b[0], b[6], b[8], b[9]) = (0x45, 0x40, 64, proto);
                b[12..16].copy_from_slice(&s.octets());
                b[16..20].copy_from_slice(&d.octets());
                b
            }
            (IpAddr::V6(s), IpAddr::V6(d)) => {
                let mut b = vec![0u8; 40];
                (b[0], b[6], b[7]) = (0x60, proto, 64);
                b[8..24].copy_from_slice(&s.octets());
                b[24..40].copy_from_slice(&d.octets());
                b
            }
            _ => panic!("one family"),
        };
        let ip_len = b.len();
        b.extend_from_slice(&[0x10, 0x01, 0x20, 0x02]);
        if proto == TCP {
            b.extend_from_slice(&seq.to_be_bytes());
            b.extend_from_slice(&[0, 0, 0, 1, 0x80, flags, 1, 1, 0, 0, 0, 0]);
            b.extend_from_slice(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        } else {
            b.extend_from_slice(&((payload.len() + 8) as u16).to_be_bytes());
            b.extend_from_slice(&[0, 0]);
        }
        b.extend_from_slice(payload);
        let len = b.len();
        if ip_len == 20 {
            b[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            fix_ipv4_header(&mut b);
        } else {
            b[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        }
        let s = fold(pseudo_sum(&b, ip_len == 40, proto, len - ip_len) + sum(&b[ip_len..]));
        // A computed zero is sent as ones in UDP, where zero means none.
        let s = if proto == UDP && s == 0xffff { 0xffff } else { !s };
        put_sum(&mut b, ip_len + if proto == TCP { 16 } else { 6 }, s);
        b
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference_sum(data: &[u8]) -> u16 {
        let mut s = 0u32;
        for c in data.chunks(2) {
            s += u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]));
            s = (s >> 16) + (s & 0xffff);
        }
        s as u16
    }

    #[test]
    fn sum_agrees_with_the_definition() {
        let data: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for len in (0..300).chain([1000, 1419, 1420, 4999, 5000]) {
            for start in 0..3.min(data.len() - len + 1) {
                let d = &data[start..start + len];
                assert_eq!(fold(sum(d)).to_ne_bytes(), reference_sum(d).to_be_bytes(), "{len}");
            }
        }
    }

    #[test]
    fn parse_table() {
        let ok = build::l4("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap(), TCP, 1, 16, b"xyz");
        let i = parse(&ok).unwrap();
        assert_eq!((i.src.to_string().as_str(), i.len), ("10.0.0.1", ok.len()));
        let t = transport(&ok).unwrap();
        assert_eq!((t.ip_len, t.header_len, t.v6), (20, 52, false));
        assert!(transport_sum_ok(&ok, &t));
        let mut padded = ok.clone();
        padded.resize(ok.len() + 7, 0);
        assert_eq!(parse(&padded).unwrap().len, ok.len());
        assert_eq!(parse(&ok[..ok.len() - 1]), None, "truncated");
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&[0x45; 19]), None);
        assert_eq!(parse(&[0x60; 39]), None);
        let mut short_header = ok.clone();
        short_header[0] = 0x44;
        assert_eq!(parse(&short_header), None);
        short_header[0] = 0x55;
        assert_eq!(parse(&short_header), None);
        let mut fragment = ok.clone();
        fragment[6] = 0x20;
        assert_eq!(transport(&fragment), None);
        let mut doff = ok.clone();
        doff[32] = 0xf0;
        assert_eq!(transport(&doff[..70.min(doff.len())]), None, "data offset past the end");
        let six = build::l4("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap(), UDP, 0, 0, b"hello");
        let t = transport(&six).unwrap();
        assert_eq!((parse(&six).unwrap().len, t.header_len, t.v6), (53, 48, true));
        assert!(transport_sum_ok(&six, &t));
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut seed = 3u64;
        for _ in 0..100_000 {
            let mut b = [0u8; 96];
            for x in &mut b {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                *x = (seed >> 56) as u8;
            }
            b[0] = if seed & 64 == 0 { 0x45 } else { 0x60 };
            b[2] = 0;
            b[4] = 0;
            let cut = (seed >> 40) as usize % 97;
            if let Some(i) = parse(&b[..cut]) {
                assert!(i.len <= cut);
                if let Some(t) = transport(&b[..i.len]) {
                    assert!(t.header_len <= i.len);
                    transport_sum_ok(&b[..i.len], &t);
                }
            }
        }
    }
}
